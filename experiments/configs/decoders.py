"""Decoders that are trained beside each other, for a few steps.

    python -m experiments.decoders --config=experiments/configs/decoders.py:PRESET --workdir=DIR

- quick (default): softmax and gated linear attention in two small layers on characters, at lengths
  32 and 64. One minute on 2 CPU cores.
- implementations_h100: softmax attention by XLA, by cuDNN and by the kernel for Hopper GPUs, which
  are to have equal losses: a decoder of 124 million parameters at length 2048, batch 8, and
  nanoGPT's shakespeare_char without dropout on the weights.
- lengths_h100: the decoder of 124 million parameters with softmax, gated linear attention and the
  gated delta rule, each by the fastest kernel, at lengths 2048, 8192 and 32,768, of 32,768 tokens a
  step.

In both the blocks are a loop that is unrolled: they are traced once, and the compiled program is
that of blocks one after another.

Texts are `wikitext2/wikitext2.npz` and `tinyshakespeare/input.txt` in `config.data_dir`. The former
has 33,278 words, to which the model adds two.
"""

from ml_collections import ConfigDict

from experiments.configs import language, plan

TOKENS = 2**15
SOFTMAX = "dot_product_attention", {"num_heads": 12, "rope_theta": 500000.0}
IMPLEMENTATIONS = "xla", "cudnn", "mosaic_gpu"
MIXERS = {
    "softmax": (SOFTMAX[0], SOFTMAX[1] | {"implementation": "mosaic_gpu"}),
    "gated linear attention": ("gated_linear_attention", {"num_heads": 6}),
    "gated delta rule": ("gated_delta_rule", {"num_heads": 6, "head_dim": 64}),
}


def get_config(preset: str = "quick") -> ConfigDict:
    """The config of a preset.

    Raises:
      ValueError: there is no such preset.
    """
    decoder = plan.get_config("124m-softmax-2k-1")
    decoder.update(file="wikitext2/wikitext2.npz", unit="token")
    decoder.model.remat = False
    characters = language.get_config("shakespeare_char")
    for model in decoder, characters:
        model.model.update(scan=True, unroll=model.model.num_layers)
    small = language.get_config()
    small.model.update(num_layers=2, width=32)
    for model in decoder, characters, small:
        model.optimizer.update(schedule="constant", warmup=10, learning_rate=6e-4)
    config = ConfigDict(
        {
            "seed": 0,
            "data_dir": "data",
            "dtype": "bfloat16",
            "steps": 40,
            "untimed": 10,
            "processes": 9,
            "repeats": 5,
            "vocab_multiple": 128,
            "models": {"124m": decoder, "char": characters},
            "variants": (),
        }
    )
    if preset == "implementations_h100":
        config.variants = tuple(
            variant(model, f"softmax, {name}", (mixer, given | {"implementation": name}), *shape)
            for model, (mixer, given), *shape in (
                ("124m", SOFTMAX, 2048, 8),
                ("char", (SOFTMAX[0], {"num_heads": 6}), 256, 64),
            )
            for name in IMPLEMENTATIONS
        )
    elif preset == "lengths_h100":
        config.variants = tuple(
            variant("124m", name, mixer, length, TOKENS // length)
            for length in (2048, 8192, 32768)
            for name, mixer in MIXERS.items()
        )
    elif preset == "quick":
        config.update(dtype="float32", steps=20, untimed=5, processes=1)
        config.models = ConfigDict({"small": small})
        config.variants = tuple(
            variant("small", name, (name, {"num_heads": 2}), length, 256 // length)
            for length in (32, 64)
            for name in (SOFTMAX[0], "gated_linear_attention")
        )
    else:
        known = "quick, implementations_h100 or lengths_h100"
        raise ValueError(f"preset must be {known}, got {preset!r}")
    return config


def variant(model: str, name: str, mixer: tuple[str, dict], length: int, batch_size: int) -> dict:
    """An entry of `config.variants`; the mixer is its name and arguments."""
    return {
        "model": model,
        "name": name,
        "mixer": mixer[0],
        "mixer_args": mixer[1],
        "length": length,
        "batch_size": batch_size,
    }
