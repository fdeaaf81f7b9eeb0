"""Rows of linear attention by maps of its own, and of attention through a few rows."""

import math

from attn_lab import ops
from attn_lab.catalogue.mechanism import ENGINE_1, QKV, Mechanism, Sizes


def _flops(s: Sizes) -> int:
    return 2 * s.B * s.H * (s.T + s.S) * s.D * s.V


def _fastmax_flops(s: Sizes) -> int:
    return 2 * s.B * s.H * (s.T + s.S) * math.comb(s.D + 2, 2) * s.V


_BIDIRECTIONAL = dict(family="recurrence", causal=(False,), flops=_flops)
_GATES = {
    f"{gate}{side}": (kind, axes)
    for side, axes in (("q", "BTH"), ("k", "BSK"))
    for gate, kind in (("gamma_", "above_one"), ("lam_", "beta"))
}
_LOG_NORMAL = (
    "Linear Log-Normal Attention with Unbiased Concentration",
    2023,
    "2311.13541",
)
_TEMPERATURES = {"alpha": 1.0, "beta": 1.0}  # by default they are those of the whole batch

ROWS = (
    Mechanism(
        "simplified_linear_attention",
        ops.simplified_linear_attention,
        "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive "
        "Re-parameterized Batch Normalization",
        2024,
        "2405.11582",
        "linear",
        golden=("simplified_linear_attention",),
    ),
    Mechanism(
        "dynamic_differential_linear_attention",
        ops.dynamic_differential_linear_attention,
        "Dynamic Differential Linear Attention",
        2026,
        "2601.13683",
        arguments=QKV
        | {"q_redundant": ("normal", "BTHD"), "k_redundant": ("normal", "BSKD")}
        | _GATES
        | {"gamma_qr": ("above_one", "BTH"), "gamma_kr": ("above_one", "BSK")},
        golden=("dynamic_differential_linear_attention",),
        **_BIDIRECTIONAL | {"cross": True},
    ),
    Mechanism(
        "linear_log_normal_attention",
        ops.linear_log_normal_attention,
        *_LOG_NORMAL,
        arguments=QKV,
        settings=_TEMPERATURES,
        golden=("linear_log_normal_attention", "linear_log_normal_attention_causal"),
        **_BIDIRECTIONAL | {"cross": True},
    ),
    Mechanism(
        "linear_log_normal_diag_attention",
        ops.linear_log_normal_diag_attention,
        *_LOG_NORMAL,
        arguments=QKV,
        settings={"block_size": 4, **_TEMPERATURES},
        golden=("linear_log_normal_attention_diag",),
        **ENGINE_1
        | {
            "cross": False,
            "causal": (False,),
            "flops": lambda s: _flops(s) + 8 * s.B * s.H * s.T * (s.D + s.V),
        },
    ),
    Mechanism(
        "fastmax_attention",
        ops.fastmax_attention,
        "FAST: Factorizable Attention for Speeding up Transformers",
        2024,
        "2402.07901",
        "recurrence",
        arguments=QKV,
        cross=True,
        flops=_fastmax_flops,
        golden=(
            "fastmax_attention",
            "fastmax_attention_causal",
            "fastmax_attention_standardized",
        ),
    ),
    Mechanism(
        "galerkin_attention",
        ops.galerkin_attention,
        "Choose a Transformer: Fourier or Galerkin",
        2021,
        "2105.14995",
        arguments=QKV
        | {"weight_k": ("normal", "KD"), "bias_k": ("normal", "KD")}
        | {"weight_v": ("normal", "KV"), "bias_v": ("normal", "KV")},
        golden=("galerkin_attention",),
        **_BIDIRECTIONAL | {"cross": True},
    ),
    Mechanism(
        "fourier_attention",
        ops.fourier_attention,
        "Choose a Transformer: Fourier or Galerkin",
        2021,
        "2105.14995",
        arguments=QKV
        | {"weight_q": ("normal", "HD"), "bias_q": ("normal", "HD")}
        | {"weight_k": ("normal", "KD"), "bias_k": ("normal", "KD")},
        golden=("fourier_attention",),
        **_BIDIRECTIONAL | {"cross": True},
    ),
    Mechanism(
        "latte_attention",
        ops.latte_attention,
        "Latent Attention for Linear Time Transformers",
        2024,
        "2402.17512",
        "recurrence",
        arguments={
            "q_logits": ("normal", "BTHD"),
            "k_logits": ("normal", "BTKD"),
            "v": ("normal", "BTKV"),
        },
        flops=lambda s: 4 * s.B * s.H * s.T * s.D * s.V,
        golden=("latte_attention", "latte_attention_bidirectional"),
    ),
    Mechanism(
        "linformer_attention",
        ops.linformer_attention,
        "Linformer: Self-Attention with Linear Complexity",
        2020,
        "2006.04768",
        arguments=QKV | {"proj_k": ("small", "PS"), "proj_v": ("small", "PS")},
        golden=("linformer_attention",),
        **ENGINE_1
        | {
            "causal": (False,),
            "flops": lambda s: 2 * s.B * s.P * (s.D + s.V) * (s.H * s.T + s.K * s.S),
        },
    ),
)
