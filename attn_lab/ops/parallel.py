"""Attention in parts, as devices compute it, on one device: the parts and how they join."""

import functools

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.layout import Layout
from attn_lab.ops.masks import as_mask

__all__ = ["merge_attention", "ring_attention_reference", "tensor_parallel_attention_reference"]


def merge_attention(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Joins softmax attention over disjoint sets of keys into attention over all of them.

    `lse = logsumexp_n lse_n`, `out = sum_n exp(lse_n - lse) out_n`. A part without keys has an lse
    of -inf and changes nothing.

    Args:
      outs: `[N, B, T, H, Dv]`, the output over each set.
      lses: `[N, B, T, H]`, the log of the softmax denominator over each set.

    Returns:
      `[B, T, H, Dv]` in the dtype of `outs` and `[B, T, H]`; 0 and -inf where no set has keys.

    Source: Milakov and Gimelshein, 2018, arXiv 1805.02867; Liu et al., 2023, arXiv 2310.01889.
    """
    wide = jnp.result_type(jnp.float32, lses.dtype)
    lses = lses.astype(wide)
    top = jax.lax.stop_gradient(lses.max(0))
    top = jnp.where(top == -jnp.inf, 0, top)
    weights = jnp.exp(lses - top)
    total = weights.sum(0)
    some = total > 0
    total = jnp.where(some, total, 1)
    out = (weights[..., None] * outs).sum(0) / total[..., None]
    return out.astype(outs.dtype), jnp.where(some, jnp.log(total) + top, -jnp.inf)


def ring_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    num_shards: int,
    layout: str = "contiguous",
    causal: bool = False,
    scale: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Ring attention of several devices on one: every part by itself, joined in the ring's order.

    `out_r = merge_s attention(q_r, k_(r - s), v_(r - s))` for the steps s = 0 ... N - 1.

    Args:
      q: `[B, T, H, D]`, in natural order as all arrays.
      k, v: `[B, T, K, D]` and `[B, T, K, Dv]`; K divides H.
      num_shards: N, which divides T; zigzag needs that 2 N does.
      layout: which positions a device has: "contiguous", "zigzag" or "striped".
      causal: query t sees the keys up to t.
      scale: by default `1 / sqrt(D)`.

    Returns:
      The output `[B, T, H, Dv]` and the log of the denominators `[B, T, H]`.

    Raises:
      ValueError: if the layout is unknown or the shards do not divide T.

    Source: Liu et al., 2023, arXiv 2310.01889; Brandon et al., 2023, arXiv 2311.09431.
    """
    length = q.shape[1]
    if num_shards < 1 or length % num_shards:
        raise ValueError(f"num_shards must divide the length {length}, got {num_shards}")
    order = Layout(layout, num_shards, length // num_shards).permutation()
    shards = order.reshape(num_shards, -1)

    def part(mine, theirs):
        allowed = mine[:, None] >= theirs if causal else None
        return engine.attention(
            q[:, mine],
            k[:, theirs],
            v[:, theirs],
            mask=as_mask(allowed, False),
            scale=scale,
            return_stats=True,
        )

    def row(r):
        parts = [part(shards[r], shards[r - s]) for s in range(num_shards)]
        return merge_attention(*(jnp.stack(x) for x in zip(*parts)))

    natural = order.argsort()
    rows = zip(*map(row, range(num_shards)))
    out, lse = (jnp.concatenate(x, 1)[:, natural] for x in rows)
    return out, lse


def tensor_parallel_attention_reference(
    x: jax.Array,
    wq: jax.Array,
    wk: jax.Array,
    wv: jax.Array,
    wo: jax.Array,
    *,
    num_shards: int,
    causal: bool,
) -> jax.Array:
    """Self-attention whose heads are spread over devices, on one: `sum_r attention_r(x) wo_r`.

    Args:
      x: `[B, T, M]`.
      wq, wk, wv: `[M, H, D]`; shard r has the heads from `r H / N` on.
      wo: `[H, D, M]`.
      num_shards: N, which divides H.
      causal: query t sees the keys up to t.

    Returns:
      `[B, T, M]`.

    Raises:
      ValueError: if the shards do not divide the heads.

    Source: Shoeybi et al., 2019, arXiv 1909.08053.
    """
    if num_shards < 1 or wq.shape[1] % num_shards:
        raise ValueError(f"num_shards must divide the {wq.shape[1]} heads, got {num_shards}")
    columns = zip(*(jnp.split(w, num_shards, 1) for w in (wq, wk, wv)))
    rows = jnp.split(wo, num_shards)
    parts = (heads_attention(x, *w, wo, causal=causal) for w, wo in zip(columns, rows))
    return functools.reduce(jnp.add, parts)


def heads_attention(x, wq, wk, wv, wo, *, causal):
    """What some of the heads add to the output."""
    q, k, v = (jnp.einsum("btm,mhd->bthd", x, w) for w in (wq, wk, wv))
    out = engine.attention(q, k, v, mask=as_mask(None, causal))
    return jnp.einsum("bthd,hdm->btm", out, wo)
