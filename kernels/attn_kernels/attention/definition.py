"""Attention as it is defined: the whole matrix of weights at once."""

import jax
import jax.numpy as jnp

from attn_kernels.attention.tile import Tile, contract, masked_scores


def weights(tile: Tile) -> tuple[jax.Array, jax.Array | None]:
    """The weights `[B, H, T, S]` and the statistics `[B, H, T, 1]` of all rows."""
    q_len, k_len = tile.q.shape[2], tile.k.shape[2]
    scores = masked_scores(tile, jnp.arange(q_len) + (k_len - q_len), jnp.arange(k_len))
    stats = tile.normalizer.initial()
    if stats is not None:
        stats = tile.normalizer.combine(stats.astype(scores.dtype), tile.normalizer.partial(scores))
    return tile.normalizer.weight(scores, stats), stats


def attend(tile: Tile) -> tuple[jax.Array, jax.Array | None]:
    """The output `[B, H, T, Dv]` in float32 or better, and the statistics."""
    w, stats = weights(tile)
    return contract(w.astype(tile.v.dtype), tile.v, transpose=False), stats
