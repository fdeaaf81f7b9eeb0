"""Rows of expanded states, and of attention as regression, filter or decay over a grid."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import ENGINE_1, QKV, Mechanism, Sizes


def _partitions_flops(s: Sizes) -> int:
    return 4 * s.B * s.H * s.P * s.T * s.D * s.V


def _regression_flops(s: Sizes) -> int:
    """Scores, the means of keys, of their squares and of values, and how the last one changes."""
    pairs = 2 * s.B * s.H * s.T * s.S * (s.D + s.D + s.D**2 + 3 * s.V)
    return pairs + s.B * s.H * s.T * s.D**3 // 3


ROWS = (
    Mechanism(
        "sparse_state_expansion",
        ops.sparse_state_expansion,
        "Scaling Linear Attention with Sparse State Expansion",
        2025,
        "2507.16577",
        "recurrence",
        arguments={
            "q": ("normal", "BTHD"),
            "k": ("normal", "BTKD"),
            "v": ("normal", "BTKV"),
            "log_decay": ("log_decay", "BTHD"),
            "router_logits": ("normal", "BTP"),
        },
        causal=(True,),
        flops=_partitions_flops,
        golden=("row_sparse_key", "sparse_state_expansion"),
    ),
    Mechanism(
        "local_linear_attention",
        ops.local_linear_attention,
        "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For "
        "Test-Time Regression",
        2025,
        "2510.01450",
        arguments=QKV | {"ridge": ("above_one", "BHT")},
        golden=("local_linear_attention",),
        **ENGINE_1 | {"flops": _regression_flops},
    ),
    Mechanism(
        "adaptive_filter_attention",
        ops.adaptive_filter_attention,
        "Attention as an Adaptive Filter",
        2025,
        "2509.04154",
        "linear",
        golden=("adaptive_filter_attention",),
    ),
    Mechanism(
        "manhattan_attention",
        ops.manhattan_attention,
        "RMT: Retentive Networks Meet Vision Transformers",
        2023,
        "2309.11523",
        "linear",
        golden=(
            "manhattan_attention",
            "manhattan_attention_decomposed",
            "manhattan_attention_sigmoid",
            "manhattan_retention_2d",
        ),
    ),
)
