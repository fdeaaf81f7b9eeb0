"""One tile of attention, as every implementation computes it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from attn_kernels.attention.mask import Mask
from attn_kernels.attention.normalizer import Normalizer, Stats
from attn_kernels.attention.score import Score
from attn_kernels.attention.score_mod import ScoreMod
from attn_kernels.layout import Layout


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q_rank", "k_rank"),
    meta_fields=("q_layout", "k_layout"),
)
@dataclasses.dataclass(frozen=True)
class Place:
    """Which part of a larger problem a tile is: the queries of one device, the keys of another.

    Attributes:
      q_rank, k_rank: the numbers of the devices, integers `[1, 1, 1, 1]`.
      q_layout, k_layout: which positions devices hold.
    """

    q_rank: jax.Array
    k_rank: jax.Array
    q_layout: Layout
    k_layout: Layout

    def queries(self, index: jax.Array) -> jax.Array:
        """The positions of the tile's queries `index`."""
        return self.q_layout.positions(self.q_rank[0, 0, 0, 0], index)

    def keys(self, index: jax.Array) -> jax.Array:
        """The positions of the tile's keys `index`."""
        return self.k_layout.positions(self.k_rank[0, 0, 0, 0], index)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("q", "k", "v", "scale", "score", "mask", "score_mod", "normalizer", "place"),
    meta_fields=("summing",),
)
@dataclasses.dataclass(frozen=True)
class Tile:
    """The arguments of attention with heads first: q `[B, H, T, D]`, k `[B, K, S, D]`, v alike.

    Query t stands at position `t + S - T` and key s at s, unless there is a `place`. A tile that is
    `summing` asks for sums of weights: v is ones.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    scale: jax.Array
    score: Score | None
    mask: Mask | None
    score_mod: ScoreMod | None
    normalizer: Normalizer
    place: Place | None = None
    summing: bool = False


def contract(heads: jax.Array, shared: jax.Array, transpose: bool) -> jax.Array:
    """`[B, H, T, n] x [B, K, m, n]^T` or, not transposed, `[B, H, T, m] x [B, K, m, n]`.

    K divides H, and query head h reads shared head h // (H / K).
    """
    batch, count, length, _ = heads.shape
    grouped = heads.reshape(batch, shared.shape[1], -1, length, heads.shape[-1])
    spec = "bkgtn,bkmn->bkgtm" if transpose else "bkgtm,bkmn->bkgtn"
    accumulate = accumulation_dtype(heads, shared)
    out = jnp.einsum(spec, grouped, shared, preferred_element_type=accumulate)
    return out.reshape(batch, count, length, -1)


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Float32, or float64 if an array is."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays))


def masked_scores(tile: Tile, q_index: jax.Array, k_index: jax.Array, exists=None) -> jax.Array:
    """The modified scores `[B, H, T, S]` of a tile; -inf where a pair is not allowed.

    Args:
      tile: the tile's arrays.
      q_index, k_index: positions [T] and [S] of its queries and keys.
      exists: optional bool [S]; False for keys that only pad the tile.
    """
    batch, heads = tile.q.shape[:2]
    b, h = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None]
    indices = b, h, q_index[:, None], k_index
    if tile.score is None:
        scores = contract(tile.q, tile.k, transpose=True) * tile.scale
    else:
        dtype = accumulation_dtype(tile.q, tile.k)
        keys = jnp.repeat(tile.k.astype(dtype), heads // tile.k.shape[1], 1)
        scores = tile.score(tile.q.astype(dtype), keys, q_index, k_index) * tile.scale
    if tile.score_mod is not None:
        scores = tile.score_mod(scores, *indices).astype(scores.dtype)
    if tile.mask is not None:
        scores = jnp.where(tile.mask.allowed(*indices), scores, -jnp.inf)
    if exists is not None:
        scores = jnp.where(exists, scores, -jnp.inf)
    return scores


def silent_scores(tile: Tile) -> jax.Array:
    """The score `[B, H, T, 1]` of the normaliser's silent key; -inf if it has none."""
    dtype, silent = accumulation_dtype(tile.q), tile.normalizer.silent
    silent = jnp.asarray(-jnp.inf if silent is None else silent, dtype)
    return jnp.broadcast_to(silent, (*tile.q.shape[:3], 1))


def empty_stats(tile: Tile) -> Stats:
    """The statistics of rows before any key."""
    return tile.normalizer.partial(silent_scores(tile))
