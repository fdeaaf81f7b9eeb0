"""Differences of attention maps: what two maps have in common cancels."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.masks import as_mask

__all__ = [
    "differential_attention",
    "differential_integral_attention",
    "differential_lambda",
    "differential_lambda_init",
]


def differential_attention(
    q1: jax.Array,
    k1: jax.Array,
    q2: jax.Array,
    k2: jax.Array,
    v: jax.Array,
    lam: float | jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    bias: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The difference of two softmax maps: `(softmax(q1 k1^T) - lam softmax(q2 k2^T)) v`.

    Args:
      q1, k1: signal, `[B, T, H, D]` and `[B, S, K, D]`.
      q2, k2: noise, `[B, T, H2, D]` and `[B, S, K2, D]`; H2 divides H, and signal head h uses the
        noise map `h // (H / H2)` (grouped differential attention if H2 < H).
      v: `[B, S, Kv, Dv]`; Kv divides H.
      lam: a number or `[H]`.
      mask, bias, causal, scale, implementation: as in `dot_product_attention`, for both maps; with
        a head axis they need H2 = H.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if head counts do not divide or shapes do not fit.

    Source: Ye et al., Differential Transformer, 2024, arXiv 2410.05258; grouped: 2025, arXiv
    2510.06949.
    """
    part = dict(mask=mask, bias=bias, causal=causal, scale=scale, implementation=implementation)
    signal, noise, lam = _maps(q1, k1, q2, k2, v, lam, part)
    return (signal - lam * noise).astype(v.dtype)


def differential_integral_attention(
    q1: jax.Array,
    k1: jax.Array,
    q2: jax.Array,
    k2: jax.Array,
    v: jax.Array,
    lam: float | jax.Array,
    *,
    causal: bool = False,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Differential attention plus the mean attention of each key: `(A1 - lam A2 + lam g) v`.

    `g_tj` is the mean of `A1_mj` over all queries m, in the causal form over `m <= t`, and with a
    mask over the m that it allows t. The rows of the sum add up to 1.

    Args:
      q1, k1, q2, k2, v, lam: as in `differential_attention`.
      causal: needs T = S, as does a mask.
      mask, scale, implementation: as in `dot_product_attention`, for both maps.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if T differs from S where it may not, or as in `differential_attention`.

    Source: Cang et al., DINT Transformer, 2025, arXiv 2501.17486; the causal mean is ours.
    """
    q_len, k_len = q1.shape[1], k1.shape[1]
    if q_len != k_len and (causal or mask is not None):
        raise ValueError(f"causal and mask need as many queries as keys, got {q_len} and {k_len}")
    part = dict(mask=mask, causal=causal, scale=scale, implementation=implementation)
    signal, noise, lam = _maps(q1, k1, q2, k2, v, lam, part)
    if mask is not None:
        flat = jnp.zeros((*signal.shape[:3], 1), signal.dtype)
        mean = dot_product_attention(flat, flat, signal, mask=as_mask(mask, causal))
    elif causal:
        mean = jnp.cumsum(signal, 1) / jnp.arange(1, q_len + 1)[:, None, None]
    else:
        mean = signal.mean(1, keepdims=True)
    return (signal + lam * (mean - noise)).astype(v.dtype)


def differential_lambda(
    lq1: jax.Array, lk1: jax.Array, lq2: jax.Array, lk2: jax.Array, *, lambda_init: float
) -> jax.Array:
    """The weight of the noise map: `exp(<lq1, lk1>) - exp(<lq2, lk2>) + lambda_init`, a number.

    Args:
      lq1, lk1, lq2, lk2: learned vectors `[D]`.
      lambda_init: see `differential_lambda_init`.

    Source: Ye et al., 2024, arXiv 2410.05258.
    """
    return jnp.exp(jnp.sum(lq1 * lk1)) - jnp.exp(jnp.sum(lq2 * lk2)) + lambda_init


def differential_lambda_init(depth: int) -> float:
    """The first weight of the noise map at a layer, counted from 0: `0.8 - 0.6 exp(-0.3 depth)`.

    Source: Ye et al., 2024, arXiv 2410.05258.
    """
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def _maps(q1, k1, q2, k2, v, lam, part):
    """The signal and the noise read from v, one for each signal head, in float32 or better."""
    heads, noise_heads, value_heads = q1.shape[2], q2.shape[2], v.shape[2]
    if heads % noise_heads:
        raise ValueError(f"q2 has {noise_heads} heads, which do not divide the {heads} of q1")
    lam = jnp.asarray(lam)
    if lam.shape not in ((), (heads,)):
        raise ValueError(f"lam must be a number or [{heads}], got shape {lam.shape}")
    if noise_heads % value_heads:  # a noise map that several value heads read, once for each
        q2 = jnp.repeat(q2, heads // noise_heads, axis=2)
    signal = dot_product_attention(q1, k1, v, **part)
    noise = dot_product_attention(q2, k2, v, **part)
    noise = jnp.repeat(noise, heads // noise.shape[2], axis=2)
    wide = jnp.result_type(v, jnp.float32)
    return signal.astype(wide), noise.astype(wide), lam[..., None].astype(wide)
