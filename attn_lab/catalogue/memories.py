"""Rows of memories that learn as they read."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import Mechanism, Sizes

PAPER = "Titans: Learning to Memorize at Test Time", 2025, "2501.00663"
TOKENS = {
    "q": ("normal", "BTHD"),
    "k": ("unit", "BTHD"),
    "v": ("normal", "BTHV"),
    "lr": ("beta", "BTH"),
    "momentum": ("beta", "BTH"),
    "decay": ("beta", "BTH"),
}


def _linear_flops(s: Sizes) -> int:
    return 6 * s.B * s.T * s.H * s.D * s.V


def _mlp_flops(s: Sizes) -> int:
    """The network twice, for key and query, and its gradient."""
    return 10 * s.B * s.T * s.H * s.P * (s.D + s.V)


def _product(matrix, x):
    return x @ matrix


ROWS = (
    Mechanism(
        "neural_memory_linear",
        ops.neural_memory_linear,
        *PAPER,
        "recurrence",
        arguments=TOKENS | {"initial_state": ("normal", "BHDV")},
        settings={"chunk_size": 1},
        causal=(True,),
        flops=_linear_flops,
        golden=("neural_memory_linear", "neural_memory_linear_chunked"),
    ),
    Mechanism(
        "neural_memory_mlp",
        ops.neural_memory_mlp,
        *PAPER,
        "recurrence",
        arguments=TOKENS | {"w1": ("small", "HDP"), "w2": ("small", "HPV")},
        settings={"chunk_size": 3, "residual": False},
        causal=(True,),
        flops=_mlp_flops,
        golden=("neural_memory_mlp",),
    ),
    Mechanism(
        "neural_memory",
        ops.neural_memory,
        *PAPER,
        "linear",
        arguments=TOKENS | {"params": ("small", "HDV")},
        settings={"apply_fn": _product, "chunk_size": 2},
        causal=(True,),
        flops=_linear_flops,
    ),
)
