"""Rows of mixers that compare no queries with keys, or few: filters, planes, banks, gated units."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import Mechanism, Sizes


def _fft_flops(s: Sizes) -> int:
    """Three transforms of twice the length."""
    return 30 * s.B * s.T * s.D * (2 * s.T).bit_length()


ROWS = (
    Mechanism(
        "h3",
        ops.h3,
        "Hungry Hungry Hippos: Towards Language Modeling with State Space Models",
        2022,
        "2212.14052",
        "linear",
        arguments={name: ("normal", "BTD") for name in "qkv"}
        | {
            "shift_kernel": ("small", "DT"),
            "shift_skip": ("normal", "D"),
            "diag_kernel": ("small", "DT"),
            "diag_skip": ("normal", "D"),
        },
        causal=(True,),
        flops=lambda s: 2 * _fft_flops(s),
        golden=("h3",),
    ),
    Mechanism(
        "hyena",
        ops.hyena,
        "Hyena Hierarchy: Towards Larger Convolutional Language Models",
        2023,
        "2302.10866",
        "linear",
        arguments={name: ("normal", "BTD") for name in ("x1", "x2", "v")}
        | {"kernel": ("small", "DT"), "skip": ("normal", "D")},
        causal=(True,),
        flops=_fft_flops,
        golden=("hyena",),
    ),
    Mechanism(
        "selective_lookup",
        ops.selective_lookup,
        "Zoology: Measuring and Improving Recall in Efficient Language Models",
        2023,
        "2312.04927",
        "convolution",
        arguments={
            "x": ("normal", "BTD"),
            "update": ("normal", "BTD"),
            "scores": ("beta", "BT"),
        },
        causal=(True,),
        flops=lambda s: 2 * s.B * s.T * s.D,
        golden=("selective_lookup",),
    ),
    Mechanism(
        "grassmann_mixing",
        ops.grassmann_mixing,
        "Attention Is Not What You Need: Grassmann Flows as an Attention-Free Alternative",
        2025,
        "2512.19428",
        "linear",
        arguments={
            "h": ("normal", "BTD"),
            "w_red": ("small", ("D", 4)),
            "b_red": ("normal", (4,)),
            "w_plu": ("small", (6, "D")),
            "b_plu": ("normal", "D"),
            "w_gate": ("small", ("PD", "D")),
            "b_gate": ("normal", "D"),
        },
        causal=(True,),
        flops=lambda s: 6 * s.B * s.T * s.D * s.D + 108 * s.B * s.T,
        golden=("grassmann_mixing",),
    ),
    Mechanism(
        "gated_associative_memory",
        ops.gated_associative_memory,
        "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling",
        2025,
        "2509.00605",
        "convolution",
        arguments={
            "x": ("normal", "BTD"),
            "memory": ("normal", "PD"),
            "conv_kernel": ("normal", "PD"),
            "conv_bias": ("normal", "D"),
            "gate_kernel": ("small", ("D", "PD")),
            "gate_bias": ("normal", ("PD",)),
        },
        causal=(True,),
        variants=({"implementation": "definition"}, {"implementation": "xla"}),
        flops=lambda s: 2 * s.B * s.T * s.D * (3 * s.P + 2 * s.D),
        golden=("gated_associative_memory",),
    ),
    Mechanism(
        "mixed_chunk_attention",
        ops.mixed_chunk_attention,
        "Transformer Quality in Linear Time",
        2022,
        "2202.10447",
        "linear",
        arguments={name: ("normal", "BTD") for name in ("q_quad", "k_quad", "q_lin", "k_lin")}
        | {"v": ("normal", "BTV")},
        settings={"group_size": 4},
        flops=lambda s: 2 * s.B * s.T * (4 * (s.D + s.V) + 2 * s.D * s.V),
        golden=("mixed_chunk_attention", "mixed_chunk_attention_causal"),
    ),
    Mechanism(
        "attentive_gate",
        ops.attentive_gate,
        "MossFormer: Pushing the Performance Limit of Monaural Speech Separation",
        2023,
        "2302.11824",
        "linear",
        arguments={name: ("normal", "BTD") for name in ("att_u", "att_v", "u", "v")},
        causal=(False,),
        flops=lambda s: 4 * s.B * s.T * s.D,
        golden=("attentive_gate",),
    ),
)
