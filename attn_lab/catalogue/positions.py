"""Rows of position encodings."""

from attn_lab import ops
from attn_lab.catalogue.mechanism import Mechanism

ROWS = (
    Mechanism(
        "apply_rotary",
        ops.apply_rotary,
        "RoFormer: Enhanced Transformer with Rotary Position Embedding",
        2021,
        "2104.09864",
        "position",
        golden=(
            "rotary--half",
            "rotary--interleaved",
            "rotary_frequencies--dynamic",
            "rotary_frequencies--linear",
            "rotary_frequencies--llama3",
            "rotary_frequencies--ntk",
            "rotary_frequencies--yarn",
        ),
    ),
    Mechanism(
        "alibi_bias",
        ops.alibi_bias,
        "Train Short, Test Long: Attention with Linear Biases",
        2021,
        "2108.12409",
        "position",
        golden=("alibi_bias", "alibi_bias_factors"),
    ),
    Mechanism(
        "relative_position_bias",
        ops.relative_position_bias,
        "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
        2019,
        "1910.10683",
        "position",
        golden=("relative_position_bias--bidirectional", "relative_position_bias--causal"),
    ),
)
