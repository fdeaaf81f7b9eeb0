"""Attention to few keys: sparse normalisers, the best keys, the one best key."""

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, operand
from attn_lab.ops.attention import bias_mod
from attn_lab.ops.masks import as_mask
from attn_lab.ops.normalizers import normalize_rows

__all__ = [
    "entmax",
    "entmax15",
    "entmax_attention",
    "sparsemax",
    "straight_through_hard_attention",
    "topk_attention",
]


def sparsemax(x: jax.Array, *, axis: int = -1, mask: jax.Array | None = None) -> jax.Array:
    """The Euclidean projection onto the simplex: `max(x - tau, 0)`, which sums to 1.

    Args:
      x: any shape.
      axis: along which to normalise.
      mask: bool, broadcastable to x; False entries get weight 0.

    Returns:
      The shape and dtype of x.

    Source: Martins & Astudillo, 2016, arXiv 1602.02068.
    """
    return entmax(x, 2.0, axis=axis, mask=mask)


def entmax15(x: jax.Array, *, axis: int = -1, mask: jax.Array | None = None) -> jax.Array:
    """Entmax of alpha 1.5: `max(x / 2 - tau, 0)^2`, which sums to 1.

    Args:
      x, axis, mask: as in `sparsemax`.

    Returns:
      The shape and dtype of x.

    Source: Peters, Niculae & Martins, 2019, arXiv 1905.05702.
    """
    return entmax(x, 1.5, axis=axis, mask=mask)


def entmax(
    x: jax.Array,
    alpha: float | jax.Array,
    *,
    axis: int = -1,
    mask: jax.Array | None = None,
    num_iters: int = 50,
) -> jax.Array:
    """A sparse softmax: `max((alpha - 1) x - tau, 0)^(1 / (alpha - 1))`, which sums to 1.

    Args:
      x, axis, mask: as in `sparsemax`.
      alpha: above 1, broadcastable to x with length 1 on `axis`; near 1 it is softmax, at 2
        sparsemax. Its gradient is exact.
      num_iters: halvings of the interval that holds tau.

    Returns:
      The shape and dtype of x.

    Source: Peters, Niculae & Martins, 2019, arXiv 1905.05702.
    """
    moved = jnp.moveaxis(x, axis, -1)
    if mask is not None:
        mask = jnp.moveaxis(jnp.broadcast_to(mask, x.shape), axis, -1)
    alpha = jnp.asarray(alpha, jnp.result_type(jnp.float32, x.dtype))
    if alpha.ndim:
        alpha = jnp.moveaxis(jnp.expand_dims(alpha, range(x.ndim - alpha.ndim)), axis, -1)
        alpha = jnp.broadcast_to(alpha, (*moved.shape[:-1], 1)).reshape(1, 1, -1, 1)
    else:
        alpha = operand(alpha, "")
    return jnp.moveaxis(normalize_rows(engine.Entmax(alpha, num_iters), moved, mask), -1, axis)


def entmax_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: float | jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention with weights `entmax_alpha(s)`: sums of 1 with exact zeros.

    Args:
      q, k, v, mask, bias, causal, scale, implementation: as in `dot_product_attention`.
      alpha: above 1, a number or `[H]`; 2 is sparsemax.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Correia, Niculae & Martins, Adaptively Sparse Transformers, 2019, arXiv 1909.00015.
    """
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=engine.entmax(alpha),
        scale=scale,
        implementation=implementation,
    )


def topk_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    top_k: int,
    causal: bool = False,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention over the `top_k` best allowed keys of every query, equals included.

    Args:
      q, k, v, causal, mask, bias, scale, implementation: as in `dot_product_attention`.
      top_k: at least 1; as many as there are keys, or more, is softmax attention.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if `top_k` is below 1.

    Source: Zhao et al., Explicit Sparse Transformer, 2019, arXiv 1912.11637.
    """
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    return engine.attention(
        q,
        k,
        v,
        mask=as_mask(mask, causal),
        score_mod=bias_mod(bias),
        normalizer=engine.TopK(top_k),
        scale=scale,
        implementation=implementation,
    )


def straight_through_hard_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The value of the best key, with the gradient of softmax attention in the scores.

    `w = onehot(argmax s) + p - stop_gradient(p)`, p the softmax; the first of equals is the best.

    Args:
      q, k, v, mask, causal, scale, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Bengio, Leonard & Courville, 2013, arXiv 1308.3432 (the straight-through estimator).
    """
    part = dict(mask=as_mask(mask, causal), scale=scale, implementation=implementation)
    best = engine.best_key(q, k, **part)
    values = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    hard = jnp.take_along_axis(values, jnp.maximum(best, 0)[..., None], axis=1)
    soft = engine.attention(q, k, jax.lax.stop_gradient(v), **part)
    hard = jnp.where(best[..., None] >= 0, hard, 0)
    return (hard + (soft - jax.lax.stop_gradient(soft))).astype(v.dtype)
