"""What patterns cost a kernel that works by tiles."""

import math
from collections.abc import Sequence

import numpy as np

from attn_lab.ops import neighborhood_mask

__all__ = ["neighborhood_tile_speedup"]


def neighborhood_tile_speedup(
    shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    causal: Sequence[bool],
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
) -> tuple[int, int, float, float]:
    """How much faster neighbourhood attention by tiles can be than dense attention by the same.

    Tiles have an extent along every axis. A pair of tiles is visited if it holds an allowed pair of
    tokens; the visits of the axes multiply, as the pattern is a product. With dilation each group
    of tokens that see each other is cut into tiles of its own.

    Args:
      shape: the lengths of the axes.
      kernel, stride, dilation, causal: as in `neighborhood_mask`, one for each axis.
      q_tile, kv_tile: the extents of the tiles of queries and keys.

    Returns:
      visited: the number of visited pairs of tiles.
      total: the number of pairs of tiles.
      density: the fraction of allowed pairs of tokens.
      speedup: `total / visited`, at most `1 / density` up to ragged tiles.

    Raises:
      ValueError: if a setting is out of its range or not one for each axis.

    Source: Hassani et al., Generalized Neighborhood Attention, 2025, arXiv 2504.16922.
    """
    settings = dict(kernel=kernel, stride=stride, dilation=dilation, causal=causal)
    for name, value in dict(settings, q_tile=q_tile, kv_tile=kv_tile).items():
        if len(value) != len(shape) or min(value) < (name != "causal"):
            raise ValueError(f"{name} must be one for each axis of {shape}, got {value!r}")
    visited, total, allowed = 1, 1, 1
    for length, *axis, q_size, k_size in zip(shape, *settings.values(), q_tile, kv_tile):
        neighborhood_mask(length, *axis)  # checks the settings at the full length
        w, s, d, forward = axis
        groups = [len(range(g, length, d)) for g in range(d)]
        patterns = [(neighborhood_mask(n, w, s, 1, forward), n) for n in groups]
        maps = [np.asarray(m.block_map(n, n, q_size, k_size)) for m, n in patterns]
        visited *= sum(np.count_nonzero(x) for x in maps)
        total *= sum(x.shape[0] for x in maps) * sum(x.shape[1] for x in maps)
        allowed *= sum(int(m.count(n, n)) for m, n in patterns)
    return visited, total, allowed / math.prod(shape) ** 2, total / visited
