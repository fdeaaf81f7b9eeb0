"""How long mechanisms take at which lengths.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:PRESET --workdir=DIR

- quick (default): four mechanisms at lengths 512 to 2048, definition against streaming. 1.5 minutes
  on 2 CPU cores with other work.
- recurrence: linear attention in chunks and streaming softmax at lengths 256 to 65,536: how times
  grow and where they cross. 6 minutes on 2 CPU cores.
- h100: softmax and a window at lengths 2048 to 32,768 in bfloat16, with cuDNN beside them. 3
  minutes on one H100; the definition does not fit into memory at the greatest length.
- recurrence_h100: five recurrences in chunks at length 8192 in bfloat16, batch 8, 16 heads of 128,
  against flash-linear-attention, which must be installed (`fla-core`, PyTorch). 10 minutes on one
  H100, most of them its tuning.

`--family=recurrence` takes the recurrences of the preset, by their forms. `--config.mechanisms=a,b`
takes rows of the catalogue instead, whatever the family, and `--config.implementations=xla` some
implementations alone.
"""

from ml_collections import ConfigDict


def get_config(preset: str = "quick") -> ConfigDict:
    """The config of a preset.

    Raises:
      ValueError: there is no such preset.
    """
    config = ConfigDict(
        {
            "family": "attention",
            "families": {
                "attention": (
                    "dot_product_attention,sliding_window_attention,sigmoid_attention,"
                    "entmax_attention"
                ),
                "recurrence": (
                    "dot_product_attention,linear_attention,retention,gated_linear_attention,"
                    "delta_rule,gated_delta_rule"
                ),
            },
            "baseline": "dot_product_attention",
            "mechanisms": "",
            "implementations": "",
            "lengths": (512, 1024, 2048),
            "batch": 1,
            "heads": 2,
            "kv_heads": 2,
            "head_dim": 64,
            "dtype": "float32",
            "causal": True,
            "passes": ("forward", "forward_backward"),
            "repeats": 3,
            "patience": 60.0,
        }
    )
    if preset == "recurrence":
        config.update(
            family="recurrence",
            implementations="xla,chunk",
            lengths=tuple(2**n for n in range(8, 17)),
            heads=1,
            kv_heads=1,
            patience=5.0,
        )
    elif preset == "recurrence_h100":
        config.update(
            mechanisms="linear_attention,retention,gated_linear_attention,delta_rule,gated_delta_rule",
            implementations="chunk,fla",
            lengths=(8192,),
            batch=8,
            heads=16,
            kv_heads=16,
            head_dim=128,
            dtype="bfloat16",
            repeats=5,
        )
    elif preset == "h100":
        config.update(
            families={"attention": "dot_product_attention,sliding_window_attention"},
            lengths=(2048, 8192, 32768),
            heads=16,
            kv_heads=16,
            head_dim=128,
            dtype="bfloat16",
            repeats=5,
        )
    elif preset != "quick":
        raise ValueError(
            f"preset must be quick, recurrence, recurrence_h100 or h100, got {preset!r}"
        )
    return config
