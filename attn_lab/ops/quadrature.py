"""Attention without a softmax as a quadrature over the positions, for functions on a grid."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import match_heads
from attn_lab.ops.linear import linear_attention

__all__ = ["fourier_attention", "galerkin_attention", "head_layer_norm"]


def galerkin_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight_k: jax.Array,
    bias_k: jax.Array,
    weight_v: jax.Array,
    bias_v: jax.Array,
    *,
    eps: float = 1e-5,
) -> jax.Array:
    """A projection of q on products of layer-normed keys and values: `q (norm(k)^T norm(v)) / S`.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      weight_k, bias_k: of the layer norm of every head of k, `[K, D]`.
      weight_v, bias_v: of v, `[K, Dv]`.
      eps: added to the variances.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Cao, 2021, arXiv 2105.14995.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)
    keys = head_layer_norm(k.astype(wide), weight_k, bias_k, eps=eps)
    values = head_layer_norm(v.astype(wide), weight_v, bias_v, eps=eps)
    return _mean(q.astype(wide), keys, values, 1.0).astype(v.dtype)


def fourier_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    weight_q: jax.Array,
    bias_q: jax.Array,
    weight_k: jax.Array,
    bias_k: jax.Array,
    *,
    eps: float = 1e-5,
) -> jax.Array:
    """An integral operator with a kernel of layer-normed q and k: `(norm(q) norm(k)^T) v / S`.

    The kernel is also over `sqrt(D)`. Without a softmax the products can be taken from the right,
    in time linear in the length, which is done.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      weight_q, bias_q: of the layer norm of every head of q, `[H, D]`.
      weight_k, bias_k: of k, `[K, D]`.
      eps: added to the variances.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Cao, 2021, arXiv 2105.14995.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)
    queries = head_layer_norm(q.astype(wide), weight_q, bias_q, eps=eps)
    keys = head_layer_norm(k.astype(wide), weight_k, bias_k, eps=eps)
    return _mean(queries, keys, v, 1 / math.sqrt(q.shape[-1]))


def head_layer_norm(
    x: jax.Array, weight: jax.Array, bias: jax.Array, *, eps: float = 1e-5
) -> jax.Array:
    """Layer norm of every head with its own weight and bias.

    Args:
      x: `[B, S, H, D]`.
      weight, bias: `[H, D]`, or with more heads, to which those of x are then repeated.
      eps: added to the variance.

    Returns:
      The shape and dtype of x.

    Raises:
      ValueError: if shapes do not fit.
    """
    for name, y in ("weight", weight), ("bias", bias):
        if y.ndim != 2 or y.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} must be [H, D] with D = {x.shape[-1]}, got {list(y.shape)}")
    wide = jnp.result_type(jnp.float32, x, weight, bias)
    centred = x.astype(wide) - x.astype(wide).mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True) + eps
    normed = centred / jnp.sqrt(jnp.where(variance == 0, 1, variance))
    normed, weight, bias = match_heads(normed, weight[None, None], bias[None, None])
    return (normed * weight + bias).astype(x.dtype)


def _mean(queries, keys, values, scale):
    return linear_attention(
        queries,
        keys,
        values,
        feature_map="identity",
        normalization="none",
        scale=scale / keys.shape[1],
    )
