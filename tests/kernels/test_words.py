import functools

import calls
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels import gpu
from attn_kernels.attention import Mask, lists, operand
from attn_kernels.attention.traced import listed, tile_kinds
from attn_kernels.attention.words import words, worth
from attn_lab import ops

GRID = ops.neighborhood_mask((10, 13), (5, 3))


def stripes(b, h, q, k, shift, widths):
    return ((q + shift) // widths % 3 == k // widths % 3) & (k <= q + 20) & (q - k < 90) & (k != q)


STRIPES = Mask(stripes, (operand(jnp.arange(2), "b"), operand(jnp.array([3, 7, 11]), "h")))
SEGMENTS = GRID & ops.segment_mask(jnp.arange(260).reshape(2, 130) // 47)
MASKS = {
    "grid": (GRID, (130, 130)),
    "batch and heads": (STRIPES, (100, 150)),
    "operands": (SEGMENTS, (130, 130)),
}
each_mask = pytest.mark.parametrize("mask, lengths", MASKS.values(), ids=MASKS)


@pytest.mark.parametrize("rows", ["q", "k"])
@each_mask
def test_bits_are_those_of_the_pattern(mask, lengths, rows):
    sizes = (16, 32) if rows == "q" else (32, 16)
    order, full, some = listed(tile_kinds(mask, lengths, sizes), rows)
    own = dict(lengths=lengths, sizes=sizes, rows=rows, most=int((some - full).max()))
    got = np.asarray(words(mask, order, full, **own)).view(np.uint32)
    dense = np.asarray(mask.dense(*lengths))
    dense = dense.reshape((1,) * (4 - dense.ndim) + dense.shape)
    dense = dense if rows == "q" else dense.swapaxes(2, 3)
    dense = np.pad(dense, [(0, 0), (0, 0), (0, 32), (0, 32)])
    seen = 0
    for place in np.ndindex(order.shape[:3]):
        b, h, i = place
        for n in range(int(full[place]), int(some[place])):
            j = int(order[(*place, n)])
            tile = dense[b, h, i * 16 : i * 16 + 16, j * 32 : j * 32 + 32]
            (own,) = got[(*place, n - int(full[place]))]
            np.testing.assert_array_equal(own[:, None] >> np.arange(32, dtype=np.uint32) & 1, tile)
            seen += 1
    assert seen


@pytest.mark.parametrize(
    "mask, found",
    [
        (ops.causal_mask(), False),
        (ops.sliding_window_mask(5, 3), False),
        (Mask(stripes, (jnp.ones((1, 1, 30, 30), int), jnp.full((1, 1, 1, 1), 7))), False),
        (GRID, True),
        (STRIPES, True),
        (ops.causal_mask() & ops.segment_mask(jnp.arange(30)[None]), True),
    ],
    ids=["causal", "window", "pairs", "grid", "stripes", "segments"],
)
def test_predicates_of_few_steps_stay(mask, found):
    assert worth(mask) == found


@pytest.mark.skipif(not gpu.supported(), reason="kernels for GPUs need a newer JAX")
@pytest.mark.parametrize(
    "mask, lengths",
    [
        pytest.param(*given, id=name, marks=pytest.mark.slow if name != "operands" else ())
        for name, given in MASKS.items()
    ],
)
def test_kernels_take_them(monkeypatch, mask, lengths):
    """In interpret mode."""
    taken = []

    @functools.wraps(words)
    def wrapped(*args, **kwargs):
        taken.append(words(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(lists, "words", wrapped)
    batch, heads = (max([1, *(x.shape[n] for x in mask.operands)]) for n in range(2))
    rng = np.random.default_rng(0)
    arrays = [
        jnp.asarray(rng.normal(size=(batch, length, heads, 64)), jnp.bfloat16)
        for length in (lengths[0], lengths[1], lengths[1])
    ]
    calls.check("mosaic_gpu", {"mask": mask}, arrays, 2**-7)
    assert len(taken) == 3
