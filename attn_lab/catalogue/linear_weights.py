"""Rows of linear attention with particular decays, and of weights normalised in other ways."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import ENGINE_1, QKV, Mechanism, Sizes


def _flops(s: Sizes) -> int:
    return 2 * s.B * s.H * (s.T + s.S) * s.D * s.V


_CAUSAL_QKV = {"q": ("normal", "BTHD"), "k": ("normal", "BTKD"), "v": ("normal", "BTKV")}
_ANGLES = {"sin": ("beta", "TD"), "cos": ("beta", "TD")}
_BIDIRECTIONAL = dict(family="recurrence", causal=(False,), flops=_flops)
_ROTATED = _BIDIRECTIONAL | dict(arguments=QKV | _ANGLES, sizes={"D": 4})

ROWS = (
    Mechanism(
        "refined_gated_linear_attention",
        ops.refined_gated_linear_attention,
        "ReGLA: Refining Gated Linear Attention",
        2025,
        "2502.01578",
        "linear",
        golden=("refined_gate", "refined_gated_linear_attention"),
    ),
    Mechanism(
        "ssd",
        ops.ssd,
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality",
        2024,
        "2405.21060",
        "recurrence",
        arguments={
            "x": ("normal", "BTHV"),
            "dt": ("beta", "BTH"),
            "a": ("negative", "H"),
            "b": ("normal", "BTKD"),
            "c": ("normal", "BTKD"),
            "d": ("normal", "H"),
        },
        causal=(True,),
        heads_apart=False,
        variants=({"form": "recurrent"}, {"form": "parallel"}, {"form": "chunk"}),
        flops=_flops,
        golden=("ssd",),
    ),
    Mechanism(
        "lightning_attention",
        ops.lightning_attention,
        "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
        2024,
        "2405.17381",
        "recurrence",
        arguments=_CAUSAL_QKV | {"slopes": ("beta", "H")},
        causal=(True,),
        flops=_flops,
        golden=("lightning_attention",),
    ),
    Mechanism(
        "norm_linear_attention",
        ops.norm_linear_attention,
        "The Devil in Linear Transformer",
        2022,
        "2210.10340",
        "recurrence",
        arguments=QKV,
        cross=True,
        heads_apart=False,
        flops=_flops,
        golden=("norm_linear_attention", "simple_rms_norm"),
    ),
    Mechanism(
        "block_diagonal_attention",
        ops.block_diagonal_attention,
        "The Devil in Linear Transformer",
        2022,
        "2210.10340",
        arguments=QKV,
        settings={"block_size": 4},
        golden=("block_diagonal_attention",),
        **ENGINE_1 | {"cross": False, "flops": lambda s: 8 * s.B * s.H * s.T * (s.D + s.V)},
    ),
    Mechanism(
        "lrpe",
        ops.lrpe,
        "Scaling TransNormer to 175 Billion Parameters",
        2023,
        "2307.14995",
        "position",
        golden=("lrpe",),
    ),
    Mechanism(
        "efficient_attention",
        ops.efficient_attention,
        "Efficient Attention: Attention with Linear Complexities",
        2018,
        "1812.01243",
        arguments=QKV,
        cross=True,
        golden=("efficient_attention",),
        **_BIDIRECTIONAL,
    ),
    Mechanism(
        "flow_attention",
        ops.flow_attention,
        "Flowformer: Linearizing Transformers with Conservation Flows",
        2022,
        "2202.06258",
        arguments=QKV,
        golden=("flow_attention", "flow_attention_causal"),
        **_BIDIRECTIONAL | {"causal": (False, True)},
    ),
    Mechanism(
        "magnitude_aware_linear_attention",
        ops.magnitude_aware_linear_attention,
        "Rectifying Magnitude Neglect in Linear Attention",
        2025,
        "2507.00698",
        golden=("magnitude_aware_linear_attention",),
        **_ROTATED,
    ),
    Mechanism(
        "norm_aware_linear_attention",
        ops.norm_aware_linear_attention,
        "NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
        2025,
        "2506.21137",
        # without angles: rotated weights exceed their small sums here, beyond what float32 resolves
        arguments=QKV,
        golden=("norm_aware_linear_attention",),
        **_BIDIRECTIONAL | {"cross": True, "flops": lambda s: 2 * _flops(s)},
    ),
    Mechanism(
        "kv_gated_linear_attention",
        ops.kv_gated_linear_attention,
        "LINA: Linear Autoregressive Image Generative Models with Continuous Tokens",
        2026,
        "2601.22630",
        arguments=QKV | {"key_gate": ("beta", "SH"), "value_gate": ("beta", "SH")},
        golden=("kv_gated_linear_attention",),
        **_BIDIRECTIONAL | {"cross": True},
    ),
    Mechanism(
        "generalized_linear_attention",
        ops.linear_attention,
        "LinFusion: 1 GPU, 1 Minute, 16K Image",
        2024,
        "2409.02097",
        "linear",
        golden=("linfusion_attention",),
    ),
    Mechanism(
        "rotary_linear_attention",
        ops.rotary_linear_attention,
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        2021,
        "2104.09864",
        golden=("rotary_linear_attention",),
        **_ROTATED,
    ),
)
