"""Engine 2: gated linear recurrences with a matrix-valued state."""

from attn_kernels.recurrence.api import linear_attention, match_heads, step

__all__ = ["linear_attention", "match_heads", "step"]
