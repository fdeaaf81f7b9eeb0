"""Attention in latents: keys and values of low rank, and convolutions that make up for it."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.heads import project

__all__ = ["compressed_convolutional_qk", "latent_attention", "shifted_values"]


def latent_attention(
    q_nope: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    w_uk: jax.Array,
    w_uv: jax.Array,
    *,
    mask: Mask | jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    absorb: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Multi-head latent attention: keys and values of all heads come from one latent a token.

        k_h = [latent w_uk_h; k_rope],  v_h = latent w_uv_h
        out_h = softmax(scale [q_nope_h; q_rope_h] k_h^T) v_h

    The absorbed form computes the same as `softmax([q_nope_h w_uk_h^T; q_rope_h] [latent;
    k_rope]^T) latent w_uv_h`: heads share one key and one value, which suits decoding.

    Args:
      q_nope: queries without position, `[B, T, H, Dn]`.
      q_rope: rotated queries, `[B, T, H, Dr]`.
      latent: `[B, S, C]`, normalised.
      k_rope: the rotated key that heads share, `[B, S, Dr]`.
      w_uk, w_uv: `[C, H, Dn]` and `[C, H, Dv]`.
      mask, causal, implementation: as in `dot_product_attention`.
      scale: by default `1 / sqrt(Dn + Dr)`, in both forms.
      absorb: which form.

    Returns:
      `[B, T, H, Dv]` in the dtype of `latent`.

    Raises:
      ValueError: if shapes do not fit.

    Source: DeepSeek-V2, 2024, arXiv 2405.04434.
    """
    heads, nope = q_nope.shape[2:]
    if w_uk.shape != (latent.shape[-1], heads, nope):
        wanted = [latent.shape[-1], heads, nope]
        raise ValueError(f"w_uk must be [C, H, Dn] = {wanted}, got {list(w_uk.shape)}")
    if w_uv.shape[:2] != w_uk.shape[:2]:
        raise ValueError(f"w_uv must be [C, H, Dv] of w_uk {w_uk.shape}, got {w_uv.shape}")
    if scale is None:
        scale = 1 / math.sqrt(nope + q_rope.shape[-1])
    part = dict(mask=mask, causal=causal, scale=scale, implementation=implementation)
    if absorb:
        q = jnp.concatenate([project("bthd,chd->bthc", q_nope, w_uk), q_rope], -1)
        k = jnp.concatenate([latent, k_rope], -1)[:, :, None]
        return project(
            "bthc,chd->bthd", dot_product_attention(q, k, latent[:, :, None], **part), w_uv
        )
    keys = project("bsc,chd->bshd", latent, w_uk)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*keys.shape[:3], k_rope.shape[-1]))
    q, k = jnp.concatenate([q_nope, q_rope], -1), jnp.concatenate([keys, shared], -1)
    return dot_product_attention(q, k, project("bsc,chd->bshd", latent, w_uv), **part)


def compressed_convolutional_qk(
    q: jax.Array,
    k: jax.Array,
    conv_depth: jax.Array,
    bias_depth: jax.Array,
    conv_group: jax.Array,
    bias_group: jax.Array,
    temperature: jax.Array,
    *,
    state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Queries and keys of compressed convolutional attention: two convolutions, a skip, a norm.

        z = [q; k];  y_t = sum_a conv_depth_a z_{t-c0+1+a} + bias_depth
        u_t = sum_a y_{t-c1+1+a} conv_group_a + bias_group
        m_q = (q + k) / 2, each query with its key;  m_k = mean of m_q over the queries of a key
        q' = sqrt(D) (u_q + m_q) / |u_q + m_q|,  k' = temperature sqrt(D) (u_k + m_k) / |u_k + m_k|

    Zeros stand before the first token of z, so that y is `bias_depth` there.

    Args:
      q: `[B, T, H, D]`.
      k: `[B, T, K, D]`; K divides H.
      conv_depth, bias_depth: `[c0, H + K, D]` and `[H + K, D]`; query heads come first.
      conv_group, bias_group: `[c1, H + K, D, D]` (tap, head, in, out) and `[H + K, D]`.
      temperature: `[K]`.
      state: the z of the `c0 + c1 - 2` tokens before, `[B, c0 + c1 - 2, H + K, D]`; by default 0.
      segment_ids: integers `[B, T]`; a segment is as if it were alone. Not together with `state`.

    Returns:
      q' and k' in the shapes and dtypes of q and k; with `state` also the state after these tokens.

    Raises:
      ValueError: if shapes do not fit.

    Source: Figliolia et al., Compressed Convolutional Attention, 2025, arXiv 2510.04476.
    """
    (batch, length, heads, dim), groups = q.shape, k.shape[2]
    packed, taps = heads + groups, (conv_depth.shape[0], conv_group.shape[0])
    if heads % groups:
        raise ValueError(f"k has {groups} heads, which do not divide the {heads} of q")
    for name, x, shape in (
        ("conv_depth", conv_depth, (taps[0], packed, dim)),
        ("bias_depth", bias_depth, (packed, dim)),
        ("conv_group", conv_group, (taps[1], packed, dim, dim)),
        ("bias_group", bias_group, (packed, dim)),
        ("temperature", temperature, (groups,)),
    ):
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    past = (batch, sum(taps) - 2, packed, dim)
    if state is not None and (state.shape != past or segment_ids is not None):
        raise ValueError(f"state must be {list(past)}, without segment_ids; got {state.shape}")
    wide = jnp.result_type(jnp.float32, q, k, conv_depth, conv_group)
    z = jnp.concatenate([q, k], 2)
    before = jnp.zeros(past, z.dtype) if state is None else state.astype(z.dtype)
    z = jnp.concatenate([before, z], 1)
    y = _taps(z.astype(wide), conv_depth, lambda x, w: x * w, segment_ids, 0) + bias_depth
    u = _taps(y, conv_group, _per_head, segment_ids, bias_depth) + bias_group
    mean_q = (q.astype(wide) + jnp.repeat(k, heads // groups, 2)) / 2
    mean_k = mean_q.reshape(batch, length, groups, -1, dim).mean(3)
    new_q, new_k = _unit(u[:, :, :heads] + mean_q), _unit(u[:, :, heads:] + mean_k)
    out = new_q.astype(q.dtype), (temperature[:, None] * new_k).astype(k.dtype)
    return out if state is None else (*out, z[:, length:])


def _taps(x, kernel, apply, segment_ids, outside):
    """`sum_a apply(x_{t-c+1+a}, kernel_a)` for the steps t that have c - 1 before them.

    What is of another segment than t counts as `outside`.
    """
    size = len(kernel)
    count = x.shape[1] - size + 1
    total = 0
    for n, weight in enumerate(kernel):
        tap = x[:, n : n + count]
        if segment_ids is not None:
            ids = jnp.pad(segment_ids, ((0, 0), (x.shape[1] - segment_ids.shape[1], 0)), "edge")
            same = ids[:, n : n + count] == ids[:, size - 1 :]
            tap = jnp.where(same[..., None, None], tap, outside)
        total = total + apply(tap, weight)
    return total


def _per_head(x, weight):
    return jnp.einsum("bthi,hio->btho", x, weight)


def _unit(x):
    """`sqrt(D) x / |x|`; the constant only keeps 0 from becoming NaN."""
    squares = jnp.sum(x**2, -1, keepdims=True)
    return math.sqrt(x.shape[-1]) * x * jax.lax.rsqrt(squares + 1e-12)


def shifted_values(
    x: jax.Array,
    w_now: jax.Array,
    w_prev: jax.Array,
    *,
    num_heads: int,
    previous: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Values half of this token and half of the one before: `concat(x_t w_now, x_{t-1} w_prev)`.

    Args:
      x: `[B, T, M]`.
      w_now, w_prev: `[M, K D / 2]`.
      num_heads: K.
      previous: `[B, M]`, the token before the first one; by default 0.
      segment_ids: integers `[B, T]`; before the first token of a segment there is 0.

    Returns:
      `[B, T, K, D]` in the dtype of x.

    Raises:
      ValueError: if K does not divide the channels.

    Source: Figliolia et al., Compressed Convolutional Attention, 2025, arXiv 2510.04476.
    """
    channels = w_now.shape[-1] + w_prev.shape[-1]
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the {channels} channels of values")
    first = jnp.zeros_like(x[:, :1]) if previous is None else previous[:, None].astype(x.dtype)
    before = jnp.concatenate([first, x[:, :-1]], 1)
    if segment_ids is not None:
        inner = segment_ids[:, 1:] == segment_ids[:, :-1]
        before = before.at[:, 1:].multiply(inner[..., None].astype(x.dtype))
    parts = project("btm,mn->btn", x, w_now), project("btm,mn->btn", before, w_prev)
    return jnp.concatenate(parts, -1).reshape(*x.shape[:2], num_heads, -1)
