"""Attention patterns as `Mask` objects."""

import dataclasses

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask, operand

__all__ = [
    "as_mask",
    "block_map",
    "causal_mask",
    "dense_mask",
    "segment_mask",
    "sliding_window_mask",
]


def causal_mask() -> Mask:
    """Every query sees the keys up to its own position: `j <= i`."""
    return sliding_window_mask(-1, 0)


def sliding_window_mask(left: int, right: int) -> Mask:
    """A band around the diagonal: `i - j <= left` and `j - i <= right`.

    A causal window of `w` tokens that includes the query is `left = w - 1, right = 0`.

    Args:
      left, right: how far back and ahead a query sees; negative means without bound.

    Source: Beltagy et al., Longformer, 2020, arXiv 2004.05150.
    """
    return Mask(_Window(left, right))


@dataclasses.dataclass(frozen=True)
class _Window:
    left: int
    right: int

    def _limit(self, low, high):
        """Whether low <= left and high >= -right, where these are bounds."""
        below = low <= self.left if self.left >= 0 else True
        return (high >= -self.right) & below if self.right >= 0 else below

    def __call__(self, b, h, q_index, k_index):
        back = q_index - k_index
        return jnp.asarray(self._limit(back, back)) & jnp.ones_like(back, bool)

    def tile(self, q_first, q_last, k_first, k_last):
        nearest, farthest = q_first - k_last, q_last - k_first
        return self._limit(nearest, farthest), self._limit(farthest, nearest)


def segment_mask(segment_ids: jax.Array, k_segment_ids: jax.Array | None = None) -> Mask:
    """Queries see the keys of their own segment: `ids[b, t] == k_ids[b, j]`; not causal.

    Args:
      segment_ids: integers `[B, T]`.
      k_segment_ids: integers `[B, S]`, by default those of the queries.
    """
    keys = segment_ids if k_segment_ids is None else k_segment_ids
    return Mask(_same, (operand(segment_ids, "bq"), operand(keys, "bk")))


def _same(b, h, q_index, k_index, q_ids, k_ids):
    return q_ids == k_ids


def dense_mask(allowed: jax.Array) -> Mask:
    """The pattern of an array: bool, broadcastable to `[B, H, T, S]`."""
    allowed = jnp.asarray(allowed)
    if allowed.dtype != bool or allowed.ndim > 4:
        raise ValueError(
            f"a mask must be bool and broadcast to [B, H, T, S], got {allowed.dtype}{allowed.shape}"
        )
    return Mask(_given, (allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape),))


def _given(b, h, q_index, k_index, allowed):
    return allowed


def as_mask(mask: Mask | jax.Array | None, causal: bool = False) -> Mask | None:
    """A `Mask` from a Mask, a bool array or None, narrowed to the causal pattern if asked."""
    if mask is not None and not isinstance(mask, Mask):
        mask = dense_mask(mask)
    if causal:
        return causal_mask() if mask is None else causal_mask() & mask
    return mask


def block_map(mask: jax.Array, block_q: int, block_k: int) -> jax.Array:
    """The state of every tile of a bool array `[T, S]`: 0 empty, 1 partial, 2 full.

    Returns:
      int32 `[ceil(T / block_q), ceil(S / block_k)]`; the last tiles may be smaller.
    """
    return dense_mask(mask).block_map(*mask.shape[-2:], block_q, block_k)
