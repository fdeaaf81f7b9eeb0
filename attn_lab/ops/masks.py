"""Attention patterns as `Mask` objects."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from attn_kernels.attention import Mask, operand
from attn_lab.ops.predicates import Heads, Window

__all__ = [
    "as_mask",
    "block_map",
    "causal_mask",
    "dense_mask",
    "duo_causal_mask",
    "head_masks",
    "segment_mask",
    "sliding_window_mask",
    "token_match_mask",
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
    return Mask(Window(left, right))


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


def token_match_mask(ids: jax.Array) -> Mask:
    """Queries see the tokens equal to their own: `ids[b, t] == ids[b, j]`, `j = t` included.

    Args:
      ids: integers `[B, T]`.

    Source: Li et al., 2021, arXiv 2112.05364.
    """
    return segment_mask(ids)


def duo_causal_mask(
    q_position: jax.Array, q_depth: jax.Array, k_position: jax.Array, k_depth: jax.Array
) -> Mask:
    """Causal in position and in depth of refinement: `pos_j <= pos_t` and `depth_j <= depth_t`.

    Args:
      q_position, q_depth: integers `[T]`.
      k_position, k_depth: integers `[S]`.

    Source: Think-at-Hard, 2025, arXiv 2511.08577.
    """
    pairs = (q_position, k_position), (q_depth, k_depth)
    at_most = [Mask(_at_most, (operand(q, "q"), operand(k, "k"))) for q, k in pairs]
    return at_most[0] & at_most[1]


def _at_most(b, h, q_index, k_index, q_rank, k_rank):
    return k_rank <= q_rank


def head_masks(masks: Sequence[Mask]) -> Mask:
    """A pattern of its own for every head: that of head h is `masks[h]`.

    Equal patterns are evaluated once. A tile that is empty in all heads is skipped.

    Args:
      masks: one `Mask` for each query head.

    Returns:
      A Mask whose dense form is `[H, T, S]`, or `[B, H, T, S]` if one of them depends on b.

    Raises:
      ValueError: if `masks` is empty or holds something else than a Mask.
    """
    if not len(masks) or not all(isinstance(m, Mask) for m in masks):
        raise ValueError(f"masks must be one Mask for each head, got {masks!r}")
    keys = [(m.predicate, *map(id, m.operands)) for m in masks]
    distinct = {key: m for key, m in zip(keys, masks)}
    choice = np.array([list(distinct).index(key) for key in keys], np.int32)
    parts = tuple(distinct.values())
    heads = Heads(tuple(m.predicate for m in parts), tuple(len(m.operands) for m in parts))
    return Mask(heads, (operand(choice, "h"), *(x for m in parts for x in m.operands)))


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
