"""Rows of recurrences and convolutions."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import QKV, Mechanism, Sizes


def _recurrence_flops(s: Sizes) -> int:
    return 4 * s.B * s.H * s.T * s.D * s.V


def _delta_flops(s: Sizes) -> int:
    return 6 * s.B * s.H * s.T * s.D * s.V


UNIT_QKV = {"q": ("unit", "BTHD"), "k": ("unit", "BTKD"), "v": ("normal", "BTKV")}
_ENGINE_2 = dict(
    family="recurrence",
    causal=(True,),
    variants=({"form": "recurrent"}, {"form": "parallel"}, {"form": "chunk"}),
    flops=_recurrence_flops,
)


ROWS = (
    Mechanism(
        "linear_attention",
        ops.linear_attention,
        "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
        2020,
        "2006.16236",
        arguments=QKV,
        golden=(
            "linear_attention",
            "linear_attention_bidirectional",
            "linear_attention_subtraction",
            "linear_attention_unnormalized",
            "linfusion_attention",
        ),
        **_ENGINE_2 | {"causal": (False, True), "cross": True},
    ),
    Mechanism(
        "retention",
        ops.retention,
        "Retentive Network: A Successor to Transformer for Large Language Models",
        2023,
        "2307.08621",
        arguments={"q": ("normal", "BTHD"), "k": ("normal", "BTKD"), "v": ("normal", "BTKV")},
        heads_apart=False,
        golden=("retention", "retention_state"),
        **_ENGINE_2,
    ),
    Mechanism(
        "gated_linear_attention",
        ops.gated_linear_attention,
        "Gated Linear Attention Transformers with Hardware-Efficient Training",
        2023,
        "2312.06635",
        arguments={
            "q": ("normal", "BTHD"),
            "k": ("normal", "BTKD"),
            "v": ("normal", "BTKV"),
            "log_decay": ("log_decay", "BTHD"),
        },
        golden=(
            "gated_linear_attention",
            "gated_linear_attention_extreme",
            "gated_linear_attention_scalar",
        ),
        **_ENGINE_2,
    ),
    Mechanism(
        "delta_rule",
        ops.delta_rule,
        "Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
        2024,
        "2406.06484",
        arguments=UNIT_QKV | {"beta": ("beta", "BTH")},
        golden=("delta_rule",),
        **_ENGINE_2 | {"flops": _delta_flops},
    ),
    Mechanism(
        "gated_delta_rule",
        ops.gated_delta_rule,
        "Gated Delta Networks: Improving Mamba2 with Delta Rule",
        2024,
        "2412.06464",
        arguments=UNIT_QKV | {"beta": ("beta", "BTH"), "log_decay": ("log_decay", "BTH")},
        golden=("gated_delta_rule",),
        **_ENGINE_2 | {"flops": _delta_flops},
    ),
    Mechanism(
        "base_conv",
        ops.base_conv,
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
        2023,
        "2312.04927",
        "convolution",
        arguments={
            "x": ("normal", "BTD"),
            "conv_kernel": ("normal", "PD"),
            "conv_bias": ("normal", "D"),
            "proj_kernel": ("small", "DD"),
            "proj_bias": ("normal", "D"),
        },
        causal=(True,),
        flops=lambda s: 2 * s.B * s.T * s.D * (s.P + s.D),
        golden=("base_conv", "long_conv"),
    ),
)
