"""How evenly a causal sequence keeps the devices busy that share it."""

import numpy as np

from attn_kernels.layout import Layout


def ring_load(num_shards: int, seq_len: int, layout: str) -> np.ndarray:
    """The causal pairs that every device of ring attention computes at every step.

    Entry `[r, s]` counts the pairs `j <= i`, i among the positions of device r and j among those of
    device `(r - s) mod N`. A step takes as long as its busiest device, so the efficiency is
    `sum(load) / (N sum_s max_r load[r, s])`.

    Args:
      num_shards: N.
      seq_len: T, a multiple of 2 N.
      layout: "contiguous", "zigzag" or "striped".

    Returns:
      int64 `[N, N]`, of sum `T (T + 1) / 2`.

    Raises:
      ValueError: if the layout is unknown or T is not a multiple of 2 N.

    Source: Brandon et al., 2023, arXiv 2311.09431.
    """
    if num_shards < 1 or seq_len % (2 * num_shards):
        raise ValueError(f"seq_len must be a multiple of 2 * {num_shards}, got {seq_len}")
    shards = Layout(layout, num_shards, seq_len // num_shards).permutation()
    shards = shards.reshape(num_shards, -1)

    def pairs(r, s):
        return np.searchsorted(shards[r - s], shards[r], side="right").sum()

    steps = range(num_shards)
    return np.array([[pairs(r, s) for s in steps] for r in steps], np.int64)
