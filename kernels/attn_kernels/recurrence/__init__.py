"""Engine 2: gated linear recurrences with a matrix-valued state, and diagonal ones beside it."""

from attn_kernels.recurrence.api import linear_attention, match_heads, step
from attn_kernels.recurrence.diagonal import diagonal_recurrence

__all__ = ["diagonal_recurrence", "linear_attention", "match_heads", "step"]
