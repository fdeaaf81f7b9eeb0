"""Attention near the query or near a predicted place, and inside groups of tokens."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, Score, ScoreMod, operand
from attn_lab.ops.attention import join_keys
from attn_lab.ops.grids import Axes, from_tiles, neighborhood_mask, to_tiles
from attn_lab.ops.masks import causal_mask
from attn_lab.ops.predicates import coordinates

__all__ = [
    "gaussian_local_attention",
    "local_shuffle",
    "neighborhood_attention",
    "soft_causal_attention",
    "subsampled_attention",
]


def neighborhood_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    kernel: Axes,
    stride: Axes = 1,
    dilation: Axes = 1,
    causal: bool | tuple[bool, ...] = False,
    scale: float | None = None,
    bias_table: jax.Array | None = None,
    extra_k: jax.Array | None = None,
    extra_v: jax.Array | None = None,
    tile: Axes | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention to the nearest tokens along every axis, as many at borders as elsewhere.

    The pattern is `neighborhood_mask(shape, kernel, stride, dilation, causal)`; with a table the
    score of keys b for queries a is `scale <q_a, k_b> + table[h, b_x - a_x + w_x - 1, ...]`, in
    coordinates of steps of `dilation`.

    Args:
      q: `[B, *shape, H, D]` with one to three axes.
      k: `[B, *shape, K, D]`; K divides H.
      v: `[B, *shape, K, Dv]`.
      kernel, stride, dilation, causal: as in `neighborhood_mask`.
      scale: by default `1 / sqrt(D)`.
      bias_table: `[H, 2 w_1 - 1, ...]`, for stride 1.
      extra_k: `[B, E, K, D]`, keys that every query sees, in the same softmax.
      extra_v: `[B, E, K, Dv]`, their values.
      tile: extents that divide the axes, in which tokens are laid together inside (`to_tiles`) so
        that kernels skip most blocks; the result is the same. One value, or one for each axis.
      implementation: as in `dot_product_attention`.

    Returns:
      `[B, *shape, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit, a setting is out of its range, a tile does not divide
        its axis, the table comes with a stride, or only one of `extra_k` and `extra_v` is given.

    Source: Hassani et al., NATTEN, 2022, arXiv 2204.07143; dilation 2209.15001; stride 2504.16922.
    """
    shape = q.shape[1:-2]
    if not shape or k.shape[1:-2] != shape or v.shape[1:-2] != shape:
        raise ValueError(f"q, k, v must be [B, *shape, H, D], got {q.shape}, {k.shape}, {v.shape}")
    if (extra_k is None) != (extra_v is None):
        raise ValueError("extra_k and extra_v must be given together, got one of them")
    flat = [x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v)]
    if tile is not None:
        tile = (tile,) * len(shape) if isinstance(tile, int) else tuple(tile)
        flat = [to_tiles(x, shape, tile) for x in flat]
    mask = neighborhood_mask(shape, kernel, stride, dilation, causal, tile)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    part = dict(mask=mask, implementation=implementation)
    if bias_table is None:
        part |= dict(scale=scale)
    else:
        relative = _relative(shape, kernel, stride, dilation, bias_table, q.shape[-2], tile or ())
        part |= dict(score=Score(relative, (jnp.asarray(scale), bias_table)))
    queries, keys, values = flat
    out, logs = engine.attention(queries, keys, values, return_stats=True, **part)
    if extra_k is not None:
        part = dict(scale=scale, implementation=implementation, return_stats=True)
        out = join_keys(out, logs, *engine.attention(queries, extra_k, extra_v, **part))
    if tile is not None:
        out = from_tiles(out, shape, tile)
    return out.reshape(*q.shape[:-1], v.shape[-1])


@dataclasses.dataclass(frozen=True)
class _Relative:
    """The inner product and the entry of a table at the distance of the coordinates."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...]
    tile: tuple[int, ...]

    def __call__(self, q, k, q_index, k_index, scale, table):
        entry = 0
        ends = (coordinates(x, self.shape, self.tile) for x in (q_index, k_index))
        for a, b, w, d in zip(*ends, self.kernel, self.dilation):
            # Pairs that are out of reach are masked: any entry will do.
            apart = jnp.clip(b // d - a[:, None] // d, 1 - w, w - 1)
            entry = entry * (2 * w - 1) + apart + (w - 1)
        bias = jnp.take(table.reshape(table.shape[0], -1), entry, axis=1)
        return jnp.einsum("bhtd,bhsd->bhts", q, k) * scale + bias


def _relative(shape, kernel, stride, dilation, table, heads, tile):
    kernel, stride, dilation = (
        (x,) * len(shape) if isinstance(x, int) else tuple(x) for x in (kernel, stride, dilation)
    )
    if max(stride) > 1:
        raise ValueError(f"bias_table needs stride 1, got {stride}")
    wanted = heads, *(2 * w - 1 for w in kernel)
    if table.shape != wanted:
        raise ValueError(f"bias_table must be {wanted}, got {table.shape}")
    return _Relative(shape, kernel, dilation, tile)


def gaussian_local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    center: jax.Array,
    half_width: float,
    scale: float = 1.0,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax over the keys around a place, then weights that fall off from it as a Gaussian.

    `w = softmax(scale <q_t, k_j> over |j - p_t| <= D) * exp(-(j - p_t)^2 / (2 sigma^2))` with
    `sigma = D / 2`; they are not normalised again. Gradients reach p through the Gaussian only.

    Args:
      q, k, v, implementation: as in `dot_product_attention`.
      center: p, real positions among the keys, `[B, T, H]`.
      half_width: D.
      scale: 1 in the paper.

    Returns:
      `[B, T, H, Dv]` in the dtype of v; 0 where no key is within reach.

    Source: Luong et al., 2015, arXiv 1508.04025.
    """
    place = operand(center, "bqh")
    width = operand(jnp.asarray(half_width, place.dtype), "")
    part = dict(mask=Mask(_within, (place, width)), scale=scale, implementation=implementation)
    bell = ScoreMod(_bell, (place, width))
    out, logs = engine.attention(q, k, v, score_mod=bell, return_stats=True, **part)
    _, plain = engine.attention(q, k, v[..., :1], return_stats=True, **part)
    return (out * _share(logs, plain)[..., None]).astype(v.dtype)


def _within(b, h, q_index, k_index, center, half_width):
    return jnp.abs(k_index - center) <= half_width


def _bell(score, b, h, q_index, k_index, center, half_width):
    return score - 2 * ((k_index - center) / half_width) ** 2


def soft_causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mix: float | jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """From bidirectional to causal attention: softmax over all keys, later ones weighted by `mix`.

    `w_tj = softmax_j(<q_t, k_j> / sqrt(D)) * (1 if j <= t + S - T else mix)`. The weights are not
    normalised again, so that mix = 0 is not causal softmax attention.

    Args:
      q, k, v, implementation: as in `dot_product_attention`.
      mix: a number from 0 (causal) to 1 (bidirectional).

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Source: Wang et al., iLLaMA, 2024, arXiv 2404.06773.
    """
    part = dict(return_stats=True, implementation=implementation)
    full, logs = engine.attention(q, k, v, **part)
    causal, causal_logs = engine.attention(q, k, v, mask=causal_mask(), **part)
    share = (1 - mix) * _share(causal_logs, logs)
    return (mix * full + share[..., None] * causal).astype(v.dtype)


def _share(logs: jax.Array, total: jax.Array) -> jax.Array:
    """`exp(logs - total)`; 0, and without a gradient, where the total is -inf."""
    empty = total == -jnp.inf
    return jnp.exp(jnp.where(empty, -jnp.inf, logs) - jnp.where(empty, 0, total))


def subsampled_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    order: jax.Array,
    num_groups: int,
    *,
    causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention inside groups of tokens: those next to each other in a given order.

    Queries see the keys with `rank_j // (T / G) == rank_t // (T / G)`, where `order[rank_t] = t`.
    Only these pairs are computed, T^2 / G of them.

    Args:
      q, k, v, implementation: as in `dot_product_attention`, with S = T.
      order: a permutation of the positions, `[B, T]` or `[T]`, for example from `local_shuffle`.
      num_groups: G, which divides T.
      causal: whether to keep only `j <= t`; a query always sees itself.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if lengths differ, G does not divide T, or `order` has another shape.

    Source: Hussain et al., 2023, arXiv 2306.01705.
    """
    batch, length = q.shape[:2]
    if k.shape[1] != length or num_groups < 1 or length % num_groups:
        raise ValueError(
            f"num_groups must divide the length of q, which k shares, got {num_groups} for lengths "
            f"{length} and {k.shape[1]}"
        )
    if order.shape not in ((length,), (batch, length)):
        raise ValueError(f"order must be {(batch, length)} or {(length,)}, got {order.shape}")
    order = jnp.broadcast_to(order, (batch, length))

    def grouped(x):
        picked = jnp.take_along_axis(x, order.reshape(batch, length, *[1] * (x.ndim - 2)), 1)
        return picked.reshape(batch * num_groups, length // num_groups, *x.shape[2:])

    places = order.reshape(batch * num_groups, -1)
    earlier = Mask(_not_later, (operand(places, "bq"), operand(places, "bk")))
    out = engine.attention(
        *map(grouped, (q, k, v)), mask=earlier if causal else None, implementation=implementation
    )
    rank = jnp.argsort(order, axis=1)[..., None, None]
    return jnp.take_along_axis(out.reshape(batch, length, *out.shape[2:]), rank, 1)


def _not_later(b, h, q_index, k_index, q_place, k_place):
    return k_place <= q_place


def local_shuffle(key: jax.Array, T: int, width: float) -> jax.Array:
    """A random order in which tokens stay near their place: `argsort(t + U(-width/2, width/2))`.

    Args:
      key: of `jax.random`.
      T: the number of positions.
      width: how far tokens may move, about; `inf` is a uniform permutation.

    Returns:
      Integers `[T]`: the token of each rank.

    Source: Hussain et al., 2023, arXiv 2306.01705.
    """
    if math.isinf(width):
        return jax.random.permutation(key, T)
    return jnp.argsort(jnp.arange(T) + width * (jax.random.uniform(key, (T,)) - 0.5))
