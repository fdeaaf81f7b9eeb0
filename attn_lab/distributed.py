"""Attention over several devices: functions to be called inside `jax.shard_map`.

Each takes the arrays of one device and the name of the mesh axis along which the devices differ.
Models do not call them: `attn_kernels.parallel.sequence_parallel` runs whole models over an axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, MultiPass, Normalizer, ScoreMod, parallel
from attn_kernels.attention.api import outputs, tile_of
from attn_kernels.attention.tile import accumulation_dtype, contract
from attn_kernels.varying import varying
from attn_lab.ops.masks import as_mask
from attn_lab.ops.parallel import heads_attention

__all__ = [
    "all_to_all_attention",
    "allgather_attention",
    "ring_attention",
    "ring_self_attention",
    "tensor_parallel_attention",
]


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    layout: str = "contiguous",
    causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    normalizer: Normalizer = engine.softmax,
    return_stats: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over the keys of all devices, which travel around a ring in N - 1 steps.

    Args:
      q: `[B, T / N, H, D]`, the queries of this device.
      k, v: `[B, T / N, K, D]` and `[B, T / N, K, Dv]`, of the same positions; K divides H.
      axis_name: of the N devices.
      layout: which positions a device has: "contiguous" `[r T / N, (r + 1) T / N)`, "zigzag" (of
        2 N parts, the parts r and 2 N - 1 - r) or "striped" (those with `t mod N = r`).
      causal: query t sees the keys up to t.
      scale: by default `1 / sqrt(D)`.
      mask, score_mod: as in `attn_kernels.attention.attention`, of positions in the whole
        sequence; their operands are those of the device's queries, or of its keys.
      normalizer: one of a single pass.
      return_stats: whether to return the statistics of the rows as well.

    Returns:
      `[B, T / N, H, Dv]` in the dtype of v; with `return_stats` also `[B, T / N, H]`.

    Raises:
      ValueError: if shapes do not fit or the layout is unknown.
      NotImplementedError: if the normaliser needs several passes.

    Source: Liu et al., 2023, arXiv 2310.01889; Brandon et al., 2023, arXiv 2311.09431.
    """
    tile = _tile(q, k, v, as_mask(mask, causal), score_mod, normalizer, scale)
    attend = functools.partial(parallel.ring, axis_name=axis_name, order=layout)
    return outputs(tile, attend, v.dtype, return_stats)


def allgather_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    layout: str = "contiguous",
    causal: bool = False,
    scale: float | None = None,
    mask: Mask | None = None,
    score_mod: ScoreMod | None = None,
    normalizer: Normalizer = engine.softmax,
    return_stats: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention over the keys of all devices, which every device gathers first.

    Args:
      q, k, v, axis_name, layout, causal, scale, mask, score_mod, normalizer, return_stats: as in
        `ring_attention`.

    Returns:
      As `ring_attention`.

    Raises:
      ValueError, NotImplementedError: as `ring_attention`.

    Source: Llama Team, The Llama 3 Herd of Models, 2024, arXiv 2407.21783.
    """
    tile = _tile(q, k, v, as_mask(mask, causal), score_mod, normalizer, scale)
    attend = functools.partial(parallel.allgather, axis_name=axis_name, order=layout)
    return outputs(tile, attend, v.dtype, return_stats)


def all_to_all_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    attention_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Attention of some heads over the whole sequence: sequences are exchanged for heads and back.

    Args:
      q: `[B, T / N, H, D]`, contiguous positions; N divides H.
      k, v: `[B, T / N, K, D]` and `[B, T / N, K, Dv]`; if N does not divide K, heads are repeated.
      axis_name: of the N devices.
      attention_fn: maps `[B, T, H / N, D]` and keys and values alike to `[B, T, H / N, Dv]`, every
        head by itself.

    Returns:
      `[B, T / N, H, Dv]`.

    Raises:
      ValueError: if the devices do not divide the heads.

    Source: Jacobs et al., 2023, arXiv 2309.14509.
    """
    count = jax.lax.axis_size(axis_name)
    if q.shape[2] % count:
        raise ValueError(f"q has {q.shape[2]} heads, which {count} devices do not divide")
    out = attention_fn(*(parallel.to_heads(x, 2, 1, axis_name) for x in (q, k, v)))
    return jax.lax.all_to_all(out, axis_name, 1, 2, tiled=True)


def ring_self_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis_name: str,
    scale: float | None = None,
    mask: jax.Array | None = None,
    normalizer: Normalizer = engine.softmax,
) -> jax.Array:
    """Attention with whole rows of scores: keys go around a ring, then values do.

    `S[:, block (r - s)] = q_r k_(r - s)^T`, `P = normalizer(S)`, `o_r = sum_s P[:, block (r - s)]
    v_(r - s)`. Scores take memory `B H T^2 / N` a device; in return the normaliser may be any.

    Args:
      q: `[B, T / N, H, D]`, contiguous positions.
      k, v: `[B, T / N, K, D]` and `[B, T / N, K, Dv]`; K divides H.
      axis_name: of the N devices.
      scale: by default `1 / sqrt(D)`.
      mask: bool which broadcasts to `[B, H, T / N, T]`, the rows of this device; True may attend.
      normalizer: as in `attn_kernels.attention.attention`.

    Returns:
      `[B, T / N, H, Dv]` in the dtype of v.

    Source: Li et al., 2021, arXiv 2105.13120.
    """
    tile = tile_of(q, k, v, None, None, normalizer, scale)
    length, count = q.shape[1], jax.lax.axis_size(axis_name)
    rank = jax.lax.axis_index(axis_name)
    forward = [(n, (n + 1) % count) for n in range(count)]

    def around(moving, carry, step):
        """`step(first position, arrays of that device, carry)` for every device."""

        def body(state, n):
            moving, carry = state
            following = jax.lax.ppermute(moving, axis_name, forward)
            return (following, step((rank - n) % count * length, moving, carry)), None

        first = moving, varying(carry, tile, rank)
        (moving, carry), _ = jax.lax.scan(body, first, jnp.arange(count - 1))
        return step((rank + 1) % count * length, moving, carry)

    def score(start, k, scores):
        block = contract(tile.q, k, transpose=True) * tile.scale
        return jax.lax.dynamic_update_slice_in_dim(scores, block, start, 3)

    def read(start, v, out):
        part = jax.lax.dynamic_slice_in_dim(weights, start, length, 3)
        return out + contract(part.astype(v.dtype), v, transpose=False)

    batch, _, heads, _ = q.shape
    dtype = accumulation_dtype(q, k, v)
    scores = around(tile.k, jnp.zeros((batch, heads, length, count * length), dtype), score)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = engine.normalize(scores, normalizer)
    out = around(tile.v, jnp.zeros((batch, heads, length, v.shape[3]), dtype), read)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def tensor_parallel_attention(
    x: jax.Array,
    wq: jax.Array,
    wk: jax.Array,
    wv: jax.Array,
    wo: jax.Array,
    *,
    axis_name: str,
    causal: bool,
) -> jax.Array:
    """Self-attention whose heads are spread over devices: `psum_r(attention_r(x) wo_r)`.

    Args:
      x: `[B, T, M]`, the same on every device.
      wq, wk, wv: `[M, H / N, D]`, the heads of this device.
      wo: `[H / N, D, M]`.
      axis_name: of the N devices.
      causal: query t sees the keys up to t.

    Returns:
      `[B, T, M]`, the same on every device.

    Source: Shoeybi et al., 2019, arXiv 1909.08053.
    """
    return jax.lax.psum(heads_attention(x, wq, wk, wv, wo, causal=causal), axis_name)


def _tile(q, k, v, mask, score_mod, normalizer, scale):
    if isinstance(normalizer, MultiPass):
        raise NotImplementedError(
            f"{type(normalizer).__name__} needs several passes over the whole sequence: use "
            "`attn_kernels.parallel.sequence_parallel`, or ring_self_attention"
        )
    return tile_of(q, k, v, mask, score_mod, normalizer, scale)
