"""How long mechanisms take at which lengths.

    python -m experiments.benchmark --config=experiments/configs/benchmark.py:PRESET --workdir=DIR

- quick (default): four mechanisms at lengths 512 to 2048, definition against streaming. 1.5 minutes
  on 2 CPU cores with other work.
- recurrence: linear attention in chunks and streaming softmax at lengths 256 to 65,536: how times
  grow and where they cross. 6 minutes on 2 CPU cores.
- h100: softmax and a window at lengths 2048 to 32,768 in bfloat16, with cuDNN beside them. 3
  minutes on one H100; the definition does not fit into memory at the greatest length.
- recurrence_h100: the raw recurrences of engine 2 by its kernels for GPUs in bfloat16, beside
  flash-linear-attention, which must be installed (`fla-core`, PyTorch): batch x length x heads x
  dimension 8 x 8192 x 16 x 128, 1 x 65,536 x 16 x 128, 32 x 2048 x 4 x 256 and 32 x 2048 x 4 x 64.
  Most of the time is its tuning, for which a call has `config.tuning` seconds. Moving averages of
  2048 channels, with 16 numbers each and with a gate, are beside XLA's chunks at the first two.
- decoding_h100: steps of decoding for 32 heads of 128 at batch 1, 8 and 64, by XLA and by the
  kernel: microseconds a step, of 256 steps in one loop and (length 1) of single calls. States of
  the smaller batches stay in the cache of an H100, which is faster than its memory.
- crossover_h100: forward and backward of causal softmax, by the kernel and by cuDNN, and of
  recurrences by the fastest kernel, at lengths 512 to 65,536 of 65,536 tokens in all: from which
  length on each recurrence is faster.
- attention_h100: the kernel for Hopper GPUs at 32,768 tokens of 16 heads in bfloat16. Plain softmax
  beside cuDNN at lengths 4096 to 32,768 and head dimensions 64 to 256; at 8192 x 128 a soft cap,
  ALiBi, T5's table, a bias, sigmoid weights, sinks and segments beside PyTorch's FlexAttention,
  which must be installed; a causal window of 1024 at length 32,768.
- neighborhood_h100: neighbourhoods of 64 x 64 and 13 x 13 on a grid of 256 x 256 tokens, and of
  18 x 24 x 24 on 30 x 48 x 80, in tiles of 128, beside dense attention and FlexAttention.

The rows of all but the first three are programs of `experiments/programs.py` in `config.groups`;
they print ratios in place of growth. All programs are compiled at first, by `config.processes`.

`--family=recurrence` takes the recurrences of the preset, by their forms. `--config.mechanisms=a,b`
takes rows of the catalogue instead, whatever the family, and `--config.implementations=xla` some
implementations alone.
"""

import math

from ml_collections import ConfigDict

TOKENS = 2**15
PRESETS = (
    "quick",
    "recurrence",
    "h100",
    "recurrence_h100",
    "decoding_h100",
    "crossover_h100",
    "attention_h100",
    "neighborhood_h100",
)
RECURRENCES = "linear,retention,simple_gla,gla,delta,gated_delta"
KERNELS = dict(
    implementations="mosaic_gpu,cudnn,flex",
    heads=16,
    kv_heads=16,
    head_dim=128,
    dtype="bfloat16",
    repeats=5,
    processes=12,
)


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
            "groups": (),
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
            "tuning": 180.0,
            "processes": 1,
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
        shapes = (8, 8192, 16, 128), (1, 65536, 16, 128), (32, 2048, 4, 256), (32, 2048, 4, 64)
        groups = [
            {"batch": batch, "length": length, "heads": heads, "kv_heads": heads, "head_dim": dim}
            for batch, length, heads, dim in shapes
        ]
        averages = {"mechanisms": "average,gated_average", "implementations": "xla,triton"}
        groups += [group | averages for group in groups[:2]]
        config.update(KERNELS)
        config.update(
            groups=tuple(groups),
            mechanisms=RECURRENCES,
            implementations="mosaic_gpu,triton,fla",
        )
    elif preset == "decoding_h100":
        config.update(KERNELS)
        config.update(
            groups=tuple(
                {"batch": batch, "length": steps} for batch in (1, 8, 64) for steps in (1, 256)
            ),
            mechanisms="step_linear,step_simple_gla,step_gla,step_delta,step_gated_delta",
            implementations="xla,triton",
            heads=32,
            kv_heads=32,
            passes=("forward",),
        )
    elif preset == "crossover_h100":
        mixers = "linear,simple_gla,gla,delta,gated_delta"
        config.update(KERNELS)
        config.update(
            groups=tuple(
                {"length": length, "batch": 2**16 // length} | part
                for length in (2**n for n in range(9, 17))
                for part in (
                    {"mechanisms": "causal", "implementations": "mosaic_gpu,cudnn"},
                    {"mechanisms": mixers, "implementations": "mosaic_gpu,triton"},
                )
            ),
            baseline="causal",
            passes=("forward_backward",),
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
    elif preset == "attention_h100":
        plain = [
            {
                "mechanisms": "full,causal",
                "implementations": "mosaic_gpu,cudnn",
                "length": length,
                "batch": TOKENS // length,
                "head_dim": dim,
            }
            for dim in (64, 128, 256)
            for length in ((4096, 8192, 16384, 32768) if dim < 256 else (8192, 32768))
        ]
        modified = {
            "mechanisms": "causal,soft_cap-30,alibi,t5_table,bias,sigmoid,sinks,segments-8",
            "length": 8192,
            "batch": TOKENS // 8192,
        }
        window = {"mechanisms": "full,window-1024", "length": TOKENS, "batch": 1}
        config.update(groups=(*plain, modified, window), **KERNELS)
    elif preset == "neighborhood_h100":
        grids = {
            (256, 256): ("neighborhood-256x256-64x64-8x16", "neighborhood-256x256-13x13-8x16"),
            (30, 48, 80): ("neighborhood-30x48x80-18x24x24-2x8x8",),
        }
        groups = [
            {"mechanisms": ",".join(("full", *names)), "length": math.prod(shape), "batch": 1}
            for shape, names in grids.items()
        ]
        config.update(groups=tuple(groups), **KERNELS)
    elif preset != "quick":
        raise ValueError(f"preset must be {', '.join(PRESETS)}; got {preset!r}")
    return config
