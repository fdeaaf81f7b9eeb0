"""Attention as it is defined: the whole matrix of weights at once."""

import jax
import jax.numpy as jnp

from attn_kernels.attention.normalizer import Stats
from attn_kernels.attention.passes import settle
from attn_kernels.attention.tile import Tile, contract, empty_stats, masked_scores


def weights(tile: Tile) -> jax.Array:
    """The weights `[B, H, T, S]` in float32 or better."""
    return settle(tile, attend, lambda tile: _weights(tile)[0])


def attend(tile: Tile) -> tuple[jax.Array, Stats]:
    """The output `[B, H, T, Dv]` in float32 or better, and the statistics."""
    w, stats = _weights(tile)
    return contract(w.astype(tile.v.dtype), tile.v, transpose=False), stats


def _weights(tile):
    q_len, k_len = tile.q.shape[2], tile.k.shape[2]
    scores = masked_scores(tile, jnp.arange(q_len) + (k_len - q_len), jnp.arange(k_len))
    stats = tile.normalizer.combine(empty_stats(tile), tile.normalizer.partial(scores))
    return tile.normalizer.weight(scores, stats), stats
