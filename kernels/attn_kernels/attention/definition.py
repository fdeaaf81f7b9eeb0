"""Attention as it is defined: the whole matrix of weights at once."""

import jax
import jax.numpy as jnp

from attn_kernels.attention.normalizer import Stats
from attn_kernels.attention.tile import Tile, contract, empty_stats, masked_scores


def weights(tile: Tile) -> tuple[jax.Array, Stats]:
    """The weights `[B, H, T, S]` and the statistics of all rows."""
    q_len, k_len = tile.q.shape[2], tile.k.shape[2]
    scores = masked_scores(tile, jnp.arange(q_len) + (k_len - q_len), jnp.arange(k_len))
    stats = tile.normalizer.combine(empty_stats(tile), tile.normalizer.partial(scores))
    return tile.normalizer.weight(scores, stats), stats


def attend(tile: Tile) -> tuple[jax.Array, Stats]:
    """The output `[B, H, T, Dv]` in float32 or better, and the statistics."""
    w, stats = weights(tile)
    return contract(w.astype(tile.v.dtype), tile.v, transpose=False), stats
