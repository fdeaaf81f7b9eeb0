import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask, operand
from attn_kernels.attention.blocks import Blocks
from attn_kernels.attention.lists import Lists
from attn_kernels.attention.traced import listed, tile_kinds
from attn_lab import ops

ODD_HEADS = Mask(lambda b, h, q, k, start: k >= start, (operand(jnp.array([5, 200]), "h"),))
MASKS = {
    "causal": ops.causal_mask(),
    "window": ops.sliding_window_mask(150, 3),
    "heads": ops.causal_mask() & ODD_HEADS,
    "grid": ops.neighborhood_mask((20, 16), (5, 3)),
}


def lists_of(mask, lengths, blocks):
    order, *counts = listed(tile_kinds(mask, lengths, (blocks.held, blocks.columns)), "q")
    return Lists(order, counts, (), None, None)


@pytest.mark.parametrize("lengths", [(320, 320), (270, 320)], ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_halves_that_are_left_out_are_empty(name, lengths):
    mask, blocks = MASKS[name], Blocks(64, 128, 2)
    found = lists_of(mask, lengths, blocks)
    halves = found.halved(mask, lengths, blocks).halves
    dense = np.asarray(mask.dense(*lengths))
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    dense = np.pad(dense, [(0, 0), (0, 0), (0, 128), (0, 128)])
    order, some = np.asarray(found.order), np.asarray(found.counts[-1])
    seen = set()
    for *place, n, wg in np.ndindex(halves.shape):
        b, h, i = place
        if n >= some[tuple(place)]:
            continue
        rows = slice(i * 128 + wg * 64, i * 128 + wg * 64 + 64)
        met = [
            dense[b, h, rows, first : first + 64].any()
            for first in order[(*place, n)] * 128 + np.array([0, 64])
        ]
        half = halves[(*place, n, wg)]
        seen.add(int(half))
        if half < 0:
            assert all(met)
        else:
            assert not met[1 - half]
    assert -1 in seen and len(seen) > 1


@pytest.mark.parametrize(
    "right, blocks", [(0, Blocks(64, 64, 2)), (200, Blocks(64, 128, 2))], ids=["narrow", "needed"]
)
def test_halves_of_no_use_are_not_told_apart(right, blocks):
    mask, lengths = ops.sliding_window_mask(-1, right), (256, 256)
    assert lists_of(mask, lengths, blocks).halved(mask, lengths, blocks).halves is None


def test_lists_of_few_tiles_are_short():
    blocks, lengths = Blocks(64, 128, 2), (5120, 5120)
    for mask, short in (ops.sliding_window_mask(300, 0), True), (ops.causal_mask(), False):
        assert lists_of(mask, lengths, blocks).short == short
