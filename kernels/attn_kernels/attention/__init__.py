"""Engine 1: programmable attention, a choice of mask, score modification and normaliser."""

from attn_kernels.attention.api import attention, attention_weights, best_key, normalize
from attn_kernels.attention.mask import EMPTY, FULL, PARTIAL, Mask
from attn_kernels.attention.multipass import (
    ClippedSoftmax,
    Entmax,
    LengthScaled,
    Proportional,
    Sinkhorn,
    Standardized,
    TopK,
    clipped_softmax,
    entmax,
)
from attn_kernels.attention.normalizer import (
    Normalizer,
    Pointwise,
    Softmax,
    relu,
    sigmoid,
    softmax,
    softmax_with_sink,
)
from attn_kernels.attention.operand import operand
from attn_kernels.attention.passes import MultiPass, Rows
from attn_kernels.attention.rows import allowed_rows, map_query_blocks
from attn_kernels.attention.score import Score
from attn_kernels.attention.score_mod import ScoreMod

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "ClippedSoftmax",
    "Entmax",
    "LengthScaled",
    "Mask",
    "MultiPass",
    "Normalizer",
    "Pointwise",
    "Proportional",
    "Rows",
    "Score",
    "ScoreMod",
    "Sinkhorn",
    "Softmax",
    "Standardized",
    "TopK",
    "allowed_rows",
    "attention",
    "attention_weights",
    "best_key",
    "clipped_softmax",
    "entmax",
    "map_query_blocks",
    "normalize",
    "operand",
    "relu",
    "sigmoid",
    "softmax",
    "softmax_with_sink",
]
