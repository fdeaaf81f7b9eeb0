"""Attention as a regression of values on keys, fitted anew for every query."""

import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask
from attn_lab.ops.masks import as_mask

__all__ = ["local_linear_attention"]


def local_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ridge: float | jax.Array,
    *,
    causal: bool = True,
    scale: float | None = None,
    solver: str = "direct",
    cg_iters: int | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """The value at the query of a linear fit to values over keys, weighted as by softmax attention.

        w_ts = softmax_s(scale <q_t, k_s>),    o_t = c of the minimum over (c, M) of
        sum_s w_ts |v_s - c - M^T (k_s - q_t)|^2 + ridge_t |M|^2

    With means and covariances under w this is `o_t = mean(v) + cov(v, k) x_t`, where
    `(cov(k, k) + ridge_t) x_t = q_t - mean(k)`. Softmax attention is its limit for a large ridge;
    values that are affine in the keys are continued exactly for a small one.

    Args:
      q, k, v, mask, causal: as in `dot_product_attention`.
      implementation: one that has forward mode, by default "xla".
      ridge: positive, broadcastable to `[B, H, T]`.
      scale: of the weights, by default `1 / sqrt(D)`.
      solver: "direct" holds the covariances `[B, T, H, D, D]` and factorises them; "cg" streams
        them through conjugate gradients. Derivatives of both are those of the solution.
      cg_iters: steps of "cg", by default D; each is one pass over the keys.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; 0 in rows without keys.

    Raises:
      ValueError: if shapes do not fit, or the solver is unknown.
      NotImplementedError: if the implementation has no forward mode.

    Source: Local Linear Attention, 2025, arXiv 2510.01450.
    """
    if solver not in ("direct", "cg"):
        raise ValueError(f"solver must be 'direct' or 'cg', got {solver!r}")
    if implementation not in ("definition", "xla"):
        raise NotImplementedError(
            f"implementation must be 'definition' or 'xla', which have forward mode, "
            f"got {implementation!r}"
        )
    (batch, length, heads, dim), dtype = q.shape, v.dtype
    wide = jnp.result_type(jnp.float32, q, k, v, ridge)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    ridge = jnp.broadcast_to(jnp.asarray(ridge, wide), (batch, heads, length))
    ridge = jnp.swapaxes(ridge, 1, 2)[..., None]
    scaled = q * (1 / math.sqrt(dim) if scale is None else scale)
    mask = as_mask(mask, causal)

    def mean(x):
        """The mean of `x [B, S, K, C]` under the weights, of the scaled queries."""
        return lambda queries: engine.attention(
            queries, k, x, mask=mask, scale=1.0, implementation=implementation
        )

    def covariance(x, direction):
        """`cov(x, k) direction`: how the mean changes as the scaled queries move that way."""
        return jax.jvp(mean(x), (scaled,), (direction,))[1]

    centre = mean(k)(scaled)
    if solver == "direct":
        squares = (k[..., :, None] * k[..., None, :]).reshape(*k.shape[:3], dim * dim)
        squares = mean(squares)(scaled).reshape(*q.shape, dim)
        spread = squares - centre[..., :, None] * centre[..., None, :]
        factor = jax.scipy.linalg.cho_factor(spread + ridge[..., None] * jnp.eye(dim, dtype=wide))
        solution = jax.scipy.linalg.cho_solve(factor, (q - centre)[..., None])[..., 0]
    else:
        solution = jax.lax.custom_linear_solve(
            lambda x: covariance(k, x) + ridge * x,
            q - centre,
            lambda matvec, b: _conjugate_gradients(
                matvec, b, dim if cg_iters is None else cg_iters
            ),
            symmetric=True,
        )
    out, change = jax.jvp(mean(v), (scaled,), (solution,))
    return (out + change).astype(dtype)


def _conjugate_gradients(matvec, b, steps):
    """`matvec(x) = b` for every vector along the last axis by itself, from 0."""

    def dot(x, y):
        return jnp.sum(x * y, -1, keepdims=True)

    def body(_, carry):
        x, residual, direction = carry
        size, image = dot(residual, residual), matvec(direction)
        step = _ratio(size, dot(direction, image))
        x, residual = x + step * direction, residual - step * image
        return x, residual, residual + _ratio(dot(residual, residual), size) * direction

    return jax.lax.fori_loop(0, steps, body, (jnp.zeros_like(b), b, b))[0]


def _ratio(a, b):
    """`a / b`, and 0 once a solution is exact."""
    return a / jnp.where(b > 0, b, 1) * (b > 0)
