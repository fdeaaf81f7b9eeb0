"""Engine 1: programmable attention, a choice of mask, score modification and normaliser."""

from attn_kernels.attention.api import attention, attention_weights
from attn_kernels.attention.mask import EMPTY, FULL, PARTIAL, Mask
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
from attn_kernels.attention.rows import allowed_rows, map_query_blocks
from attn_kernels.attention.score_mod import ScoreMod

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "Mask",
    "Normalizer",
    "Pointwise",
    "ScoreMod",
    "Softmax",
    "allowed_rows",
    "attention",
    "attention_weights",
    "map_query_blocks",
    "operand",
    "relu",
    "sigmoid",
    "softmax",
    "softmax_with_sink",
]
