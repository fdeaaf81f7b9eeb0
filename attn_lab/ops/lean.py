"""Attention with few projections: heads without matrices of their own, or tokens as they are."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.attention import Mask
from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.heads import project

__all__ = [
    "head_embedding",
    "lean_attention",
    "low_rank_attention_pooling",
    "similarity_self_attention",
]


def lean_attention(
    x_q: jax.Array,
    x_k: jax.Array,
    x_v: jax.Array,
    w_q: jax.Array,
    w_k: jax.Array | None = None,
    align: jax.Array | None = None,
    *,
    num_heads: int,
    mask: Mask | jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention without a value projection, and perhaps without a key projection.

    `softmax(scale (x_q w_q) (x_k w_k)^T) (align x_v)`, where head h takes the h-th slice of the
    channels. With `w_k` it is optimised attention, without it efficient attention, and with
    `align` super attention, which mixes the values along the sequence first.

    Args:
      x_q: `[B, T, M]`.
      x_k, x_v: `[B, S, M]`.
      w_q: `[M, M]`.
      w_k: `[M, M]`; None takes the keys as they are.
      align: `[S, S]`, or `[B, S, S]`; row j makes the value of key j. None is the identity.
      num_heads: H, which divides M.
      mask, scale, implementation: as in `dot_product_attention`; D = M / H.

    Returns:
      `[B, T, H, D]` in the dtype of `x_v`, before an output projection.

    Raises:
      ValueError: if H does not divide M, or `align` is not of the length of the values.

    Source: Hosseini and Hosseini, 2024, arXiv 2403.01643.
    """
    if num_heads < 1 or x_v.shape[-1] % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the width {x_v.shape[-1]}")
    if align is not None:
        if align.shape[-2:] != (x_v.shape[1],) * 2:
            raise ValueError(
                f"align must be [{x_v.shape[1]}, {x_v.shape[1]}], the length of x_v: it is indexed "
                f"by position; got {list(align.shape)}"
            )
        x_v = project("...sc,...ts->...tc", x_v, align)
    q = project("btm,mn->btn", x_q, w_q)
    k = x_k if w_k is None else project("bsm,mn->bsn", x_k, w_k)
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1) for x in (q, k, x_v))
    return dot_product_attention(q, k, v, mask=mask, scale=scale, implementation=implementation)


def head_embedding(x: jax.Array, embedding: jax.Array, *, mode: str = "add") -> jax.Array:
    """Many heads out of one: `x + e_h`, or `x (1 + e_h)` in mode "multiply".

    Args:
      x: `[B, T, D]`, a projection that all heads share.
      embedding: `[H, D]`.
      mode: "add" or "multiply".

    Returns:
      `[B, T, H, D]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit or the mode is unknown.

    Source: Xue and Aletras, Pit One Against Many, 2023, arXiv 2310.07911.
    """
    if mode not in ("add", "multiply"):
        raise ValueError(f"mode must be 'add' or 'multiply', got {mode!r}")
    if x.ndim != 3 or embedding.ndim != 2 or embedding.shape[1] != x.shape[2]:
        raise ValueError(
            f"x must be [B, T, D] and embedding [H, D], got {x.shape} and {embedding.shape}"
        )
    wide = x[:, :, None].astype(jnp.result_type(jnp.float32, x, embedding))
    return (wide + embedding if mode == "add" else wide * (1 + embedding)).astype(x.dtype)


def low_rank_attention_pooling(
    x: jax.Array,
    context: jax.Array,
    w_x: jax.Array,
    w_c: jax.Array,
    w_head: jax.Array,
    *,
    mask: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Means of tokens, one a head, under scores of low rank against one context vector.

    `z_t = tanh((x_t w_x) * (context w_c))`, `out_h = sum_t softmax_t(z_t . w_head[:, h]) x_t`.

    Args:
      x: `[B, T, M]`.
      context: `[B, C]`.
      w_x, w_c, w_head: `[M, R]`, `[C, R]` and `[R, H]`.
      mask: bool `[B, T]`; False tokens do not count, and where none does the mean is 0.
      implementation: as in `dot_product_attention`.

    Returns:
      `[B, H, M]` in the dtype of x.

    Raises:
      ValueError: if `mask` does not fit.

    Source: Mehta et al., LAMA, 2019, arXiv 1912.00835.
    """
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(f"mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")
    z = jnp.tanh(jnp.einsum("btm,mr->btr", x, w_x) * jnp.einsum("bc,cr->br", context, w_c)[:, None])
    q = jnp.broadcast_to(w_head.T, (len(x), 1, *w_head.T.shape))
    mask = None if mask is None else mask[:, None, None]
    part = dict(mask=mask, scale=1.0, implementation=implementation)
    return dot_product_attention(q, z[:, :, None], x[:, :, None], **part)[:, 0]


def similarity_self_attention(
    x: jax.Array,
    w: jax.Array,
    *,
    symmetric: bool = False,
    scale: float | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of tokens over tokens as they are, by one matrix a head: `softmax(x W_h x^T) x`.

    Args:
      x: `[B, T, M]`.
      w: `[H, M, M]`, the matrices; if symmetric `[H, M, R]`, and `W_h = w_h w_h^T`.
      symmetric: whether the similarity of two tokens is the same both ways.
      scale: by default `1 / sqrt(M)`.
      mask, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, M]` in the dtype of x.

    Raises:
      ValueError: if `w` does not fit.

    Source: Reducing the Transformer Architecture to a Minimum, 2024, arXiv 2410.13732.
    """
    width = x.shape[-1]
    if w.ndim != 3 or w.shape[1] != width or (not symmetric and w.shape[2] != width):
        wanted = f"[H, {width}, {'R' if symmetric else width}]"
        raise ValueError(f"w must be {wanted}, got {list(w.shape)}")
    q = project("btm,hmn->bthn", x, w)
    k = q if symmetric else x[:, :, None]
    scale = 1 / math.sqrt(width) if scale is None else scale
    part = dict(mask=mask, scale=scale, implementation=implementation)
    return dot_product_attention(q, k, x[:, :, None], **part)
