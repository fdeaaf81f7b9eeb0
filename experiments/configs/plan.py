"""Decoders of today's usual shape, to be planned before they are trained.

    python -m experiments.plan --config=experiments/configs/plan.py:PRESET --topology=v5e:16x16

A preset is SIZE-MIXER-LENGTH, such as `7b-gla-1m`: 124m, 1.3b or 7b; softmax, window (of 4096
tokens), gla or gated_delta; 2k, 8k, 32k, 128k or 1m tokens. RMS norms, SwiGLU, rotary positions,
no biases, float32 parameters, bfloat16 computation, blocks recomputed in the backward pass.
A mesh is of 256 devices, or of as many as `SIZE-MIXER-LENGTH-DEVICES` says, each with 8192 tokens
of a batch and at most so many of a sequence, whose rest is on others along "seq". Other devices are
along "fsdp" as far as each has 8 rows of every kernel, and then along "data".
"""

from ml_collections import ConfigDict

from experiments.configs import language

SIZES = {"124m": (12, 768, 12), "1.3b": (24, 2048, 16), "7b": (32, 4096, 32)}
MIXERS = {
    "softmax": ("dot_product_attention", {"rope_theta": 500000.0}),
    "window": ("dot_product_attention", {"rope_theta": 500000.0, "window": 4096}),
    "gla": ("gated_linear_attention", {}),
    "gated_delta": ("gated_delta_rule", {}),
}
LENGTHS = {"2k": 2**11, "8k": 2**13, "32k": 2**15, "128k": 2**17, "1m": 2**20}
TABLE = (
    "124m-softmax-2k",
    "1.3b-softmax-8k",
    "7b-softmax-32k",
    "7b-window-128k",
    "7b-gated_delta-128k",
    "7b-gla-1m",
)


def get_config(preset: str = "124m-softmax-2k") -> ConfigDict:
    """The config of a preset.

    Raises:
      ValueError: there is no such preset.
    """
    size, mixer, length, devices = (*preset.split("-"), "256")[:4]
    for name, given, known in (
        ("size", size, SIZES),
        ("mixer", mixer, MIXERS),
        ("length", length, LENGTHS),
    ):
        if given not in known:
            raise ValueError(f"{name} of the preset must be of {', '.join(known)}; got {given!r}")
    layers, width, heads = SIZES[size]
    name, arguments = MIXERS[mixer]
    tokens = LENGTHS[length]
    count, per_device = int(devices), 2**13
    # Axes of a mesh are products of those of a torus: 16 x 16, or 8 x 8 x 8.
    side = {256: 16, 512: 8}.get(count, 2)
    sides = [side**n for n in range(count.bit_length()) if side**n <= count]
    seq = next((n for n in sides if tokens <= n * per_device), sides[-1])
    fsdp = max(n for n in sides if n * seq <= count and (n == 1 or width % (8 * n) == 0))
    config = language.get_config()
    config.update(
        {
            "vocab_size": 50304,
            "length": tokens,
            "batch_size": max(count // seq, count * per_device // tokens),
            "dtype": "bfloat16",
            "mesh": {"data": count // (fsdp * seq), "fsdp": fsdp, "tensor": 1, "seq": seq},
        }
    )
    config.model = {
        "num_layers": layers,
        "width": width,
        "mixers": name,
        "mixer_args": {"num_heads": heads} | arguments,
        "mlp": "swiglu",
        "mlp_ratio": 8 / 3,
        "norm": "rms",
        "bias": False,
        "positions": None,
        "tied": size == "124m",
        "remat": True,
        "scan": True,
    }
    return config
