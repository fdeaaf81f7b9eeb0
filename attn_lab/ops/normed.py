"""Linear attention whose output is normalised instead of divided, and what goes with it."""

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask
from attn_kernels.recurrence import match_heads
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.linear import FeatureMap, linear_attention
from attn_lab.ops.masks import as_mask
from attn_lab.ops.predicates import Blocks

__all__ = ["block_diagonal_attention", "lrpe", "norm_linear_attention", "simple_rms_norm"]


def simple_rms_norm(x: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Divides the last axis by its root mean square, without a weight: `x / sqrt(mean(x^2) + eps)`.

    Args:
      x: `[..., C]`.
      eps: added to the mean square; with 0 a row of zeros stays 0.

    Returns:
      The shape and dtype of x; the mean is in float32 or better.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """
    wide = x.astype(jnp.result_type(jnp.float32, x))
    square = jnp.square(wide).mean(-1, keepdims=True) + eps
    return (wide / jnp.sqrt(jnp.where(square == 0, 1, square))).astype(x.dtype)


def norm_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] = "elu1",
    causal: bool = False,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention with a norm over all heads of its output in place of the division.

        O_t = sum_s <phi(q_t), phi(k_s)> v_s,    o_t = O_t / sqrt(mean over heads of O_t^2 + eps)

    Args:
      q, k, v, feature_map, causal: as in `linear_attention`.
      eps: added to the mean square.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Qin et al., TransNormer, 2022, arXiv 2210.10340.
    """
    out = linear_attention(
        q,
        k,
        v.astype(jnp.result_type(jnp.float32, v)),
        feature_map=feature_map,
        normalization="none",
        causal=causal,
    )
    joined = out.reshape(*out.shape[:2], -1)
    return simple_rms_norm(joined, eps=eps).reshape(out.shape).astype(v.dtype)


def block_diagonal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    block_size: int,
    causal: bool = False,
    scale: float | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention within blocks that do not overlap; the last one may be shorter.

    Query t sees the keys j with `j // block_size = t // block_size`.

    Args:
      q, k, v, causal, scale, mask, implementation: as in `dot_product_attention`, with as many
        keys as queries.
      block_size: tokens a block; with 1 the output is v.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if there are more or fewer keys than queries, or `block_size` is not positive.

    Source: Qin et al., TransNormer, 2022, arXiv 2210.10340.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"k {k.shape} must have the length of q {q.shape}")
    blocks = Mask(Blocks(block_size))
    return dot_product_attention(
        q,
        k,
        v,
        mask=blocks if mask is None else blocks & as_mask(mask),
        causal=causal,
        scale=scale,
        implementation=implementation,
    )


def lrpe(x: jax.Array, theta: jax.Array, *, offset: int | jax.Array = 0) -> jax.Array:
    """Positions for linear attention that double the channels: `[x cos(theta t), x sin(theta t)]`.

    Products of a query and a key are then `sum_d q_d k_d cos(theta_d (t - s))`.

    Args:
      x: `[B, T, H, D]`.
      theta: frequencies `[H, D]`, learnable.
      offset: the position of the first token.

    Returns:
      `[B, T, H, 2 D]` in the dtype of x; angles are in float32 or better.

    Raises:
      ValueError: if shapes do not fit.

    Source: Qin et al., TransNormerLLM, 2023, arXiv 2307.14995.
    """
    if theta.ndim != 2 or theta.shape[1] != x.shape[-1]:
        raise ValueError(f"theta must be [H, D] with the dim of x {x.shape}, got {theta.shape}")
    wide = jnp.result_type(jnp.float32, x, theta)
    turning, frequency = match_heads(x.astype(wide), theta.astype(wide)[None, None])
    angle = (offset + jnp.arange(x.shape[1], dtype=wide))[:, None, None] * frequency[0]
    parts = turning * jnp.cos(angle)[None], turning * jnp.sin(angle)[None]
    return jnp.concatenate(parts, -1).astype(x.dtype)
