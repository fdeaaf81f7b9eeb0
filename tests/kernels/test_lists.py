import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask, operand
from attn_kernels.attention.blocks import Blocks
from attn_kernels.attention.lists import Lists, halves_of
from attn_kernels.attention.traced import listed, tile_kinds
from attn_kernels.attention.warpgroups import BOTH, NONE
from attn_lab import ops

ODD_HEADS = Mask(lambda b, h, q, k, start: k >= start, (operand(jnp.array([5, 200]), "h"),))
MASKS = {
    "causal": ops.causal_mask(),
    "window": ops.sliding_window_mask(150, 3),
    "heads": ops.causal_mask() & ODD_HEADS,
    "grid": ops.neighborhood_mask((20, 16), (5, 3)),
}


def lists_of(mask, lengths, blocks, rows="q"):
    sizes = (blocks.held, blocks.columns)[:: 1 if rows == "q" else -1]
    order, *counts = listed(tile_kinds(mask, lengths, sizes), rows)
    halves = halves_of(mask, lengths, blocks, rows, order, *map(np.asarray, counts))
    return Lists(order, counts, (), None, halves, None)


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize("rows", ["q", "k"])
@pytest.mark.parametrize("name", MASKS)
def test_halves_that_are_left_out_are_empty(name, rows, columns):
    mask, blocks, lengths = MASKS[name], Blocks(64, columns, 2), (270, 320)
    found = lists_of(mask, lengths, blocks, rows)
    dense = np.asarray(mask.dense(*lengths))
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    dense = dense if rows == "q" else dense.swapaxes(2, 3)
    dense = np.pad(dense, [(0, 0), (0, 0), (0, 128), (0, 128)])
    order, full, some = map(np.asarray, (found.order, *found.counts))
    seen = set()
    for *place, n, wg in np.ndindex(found.halves.shape):
        (b, h, i), at = place, full[tuple(place)] + n
        if at >= some[tuple(place)]:
            continue
        own = slice(i * 128 + wg * 64, i * 128 + wg * 64 + 64)
        tile = dense[b, h, own, order[(*place, at)] * columns :][:, :columns]
        met = [x.any() for x in np.split(tile, columns // 64, 1)]
        want = BOTH if all(met) else met.index(True) if any(met) else NONE
        assert found.halves[(*place, n, wg)] == want
        seen.add(want)
    assert len(seen) > 1


def test_halves_of_no_use_are_not_told_apart():
    mask = ops.sliding_window_mask(-1, 200)
    assert lists_of(mask, (256, 256), Blocks(64, 128, 2)).halves is None


def test_lists_of_few_tiles_are_short():
    blocks, lengths = Blocks(64, 128, 2), (5120, 5120)
    for mask, short in (ops.sliding_window_mask(300, 0), True), (ops.causal_mask(), False):
        assert lists_of(mask, lengths, blocks).short == short


def test_programs_take_turns_where_there_are_many_and_room():
    blocks, dims = Blocks(64, 128, 2), (128, 128)
    assert blocks.in_turns(8 * 132, "outputs", dims, 0).programs == 132
    assert blocks.in_turns(7 * 132, "outputs", dims, 0) is blocks
    assert blocks.in_turns(8 * 132, "outputs", (256, 256), 0) is blocks
