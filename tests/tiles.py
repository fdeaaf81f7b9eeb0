"""What block maps and counts of a mask must agree with."""

import numpy as np


def check(mask, q_len, k_len, block_q, block_k):
    """Compares the count and the block maps of a mask and of its complement with its dense form."""
    dense = np.asarray(mask.dense(q_len, k_len))
    assert (mask.count(q_len, k_len) == dense.sum((-1, -2))).all()
    got = np.asarray(mask.block_map(q_len, k_len, block_q, block_k))
    for i, j in np.ndindex(got.shape[-2:]):
        tile = dense[..., i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        want = np.where(tile.all((-1, -2)), 2, np.where(tile.any((-1, -2)), 1, 0))
        assert (got[..., i, j] == want).all()
    assert got.shape == (*dense.shape[:-2], -(-q_len // block_q), -(-k_len // block_k))
    flipped = np.asarray((~mask).block_map(q_len, k_len, block_q, block_k))
    assert (flipped == 2 - got).all()
