import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.ops import (
    axial_mask,
    block_local_mask,
    causal_mask,
    from_tiles,
    halo_mask,
    inward_window_mask,
    neighborhood_mask,
    product_mask,
    radial_mask,
    segment_mask,
    shifted_window_mask,
    sliding_window_mask,
    to_tiles,
)

PATTERNS = {
    "neighborhood": (neighborhood_mask((5, 9), (3, 4), (2, 1), (1, 2), (False, True)), 45),
    "tiled": (neighborhood_mask((4, 9), (3, 4), (2, 1), (1, 2), (False, True), tile=(2, 3)), 36),
    "halo": (halo_mask((5, 6), 2, (1, 2)), 30),
    "shifted": (shifted_window_mask((4, 9), (2, 3), (0, 2)), 36),
    "axial": (axial_mask((3, 4, 2), causal=True), 24),
    "radial": (radial_mask(9, 5, block=2), 45),
    "inward": (inward_window_mask((2, 3, 5), (-1, 0, 1)), 30),
}


def equal(a, b, n):
    return bool((a.dense(n, n) == b.dense(n, n)).all())


@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_agree_with_the_dense_pattern(name):
    tiles.check(*[PATTERNS[name][n] for n in (0, 1, 1)], 8, 5)


@pytest.mark.parametrize("name", PATTERNS)
def test_bounds_are_those_of_traced_ranges(name):
    mask, _ = PATTERNS[name]
    bounds = jax.jit(lambda *ranges: mask.tile(*ranges))
    for ranges in (8, 15, 0, 3), (0, 3, 20, 23), (5, 5, 5, 5):
        assert list(map(bool, bounds(*ranges))) == list(map(bool, mask.tile(*ranges)))


axis = st.builds(sliding_window_mask, st.integers(-1, 3), st.integers(-1, 3))


@settings(max_examples=5, deadline=None)
@given(axis, axis)
def test_a_product_counts_what_its_axes_count(a, b):
    mask = product_mask(a, b, shape=(5, 7))
    assert mask.count(35, 35) == a.count(5, 5) * b.count(7, 7)
    want = np.kron(np.asarray(a.dense(5, 5), int), np.asarray(b.dense(7, 7), int))
    assert (np.asarray(mask.dense(35, 35), int) == want).all()
    tiles.check(mask, 35, 35, 14, 5)


def test_axes_may_bring_operands():
    ids = jnp.array([[0, 0, 1], [0, 1, 1]])
    mask = product_mask(causal_mask(), segment_mask(ids), shape=(2, 3))
    dense = mask.dense(6, 6)
    assert dense.shape == (2, 1, 6, 6)
    for row, each in zip(ids, dense[:, 0]):
        assert (each == jnp.kron(jnp.tril(jnp.ones((2, 2))), row[:, None] == row)).all()
    tiles.check(mask, 6, 6, 3, 3)


@pytest.mark.parametrize("shape, tile", [((4, 9), (2, 3)), ((6, 2, 4), (3, 1, 2)), (12, 4)])
def test_tiles_are_consecutive_and_their_pattern_the_same(shape, tile):
    n = math.prod(shape) if isinstance(shape, tuple) else shape
    index = jnp.arange(n)[None]
    order = to_tiles(index, shape, tile)[0]
    x = jnp.stack([index, -index], -1)
    assert (to_tiles(x, shape, tile)[0, :, 1] == -order).all()
    assert (from_tiles(to_tiles(x, shape, tile), shape, tile) == x).all()
    size = math.prod(tile) if isinstance(tile, tuple) else tile
    places = np.stack(np.unravel_index(order, shape), -1).reshape(n // size, size, -1)
    assert (np.ptp(places, 1) + 1 == tile).all()
    rows = dict(kernel=2, stride=2)
    plain = neighborhood_mask(shape, **rows).dense(n, n)
    assert (neighborhood_mask(shape, **rows, tile=tile).dense(n, n) == plain[order][:, order]).all()


def test_operands_follow_their_tokens_into_tiles():
    ids = jnp.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    masks = causal_mask(), segment_mask(ids)
    order = to_tiles(jnp.arange(8)[None], (2, 4), (1, 2))[0]
    plain = product_mask(*masks, shape=(2, 4)).dense(8, 8)
    tiled = product_mask(*masks, shape=(2, 4), tile=(1, 2))
    assert (tiled.dense(8, 8) == plain[..., order, :][..., order]).all()
    tiles.check(tiled, 8, 8, 2, 3)


def test_a_neighborhood_touches_few_blocks_of_tiles():
    """64 x 64 tokens in 32 blocks: what the axes touch, multiplied."""
    n, block, axis = 64**2, 128, neighborhood_mask(64, 16)
    touched = [np.count_nonzero(axis.block_map(64, 64, size, size)) for size in (8, 16)]
    tiled = neighborhood_mask((64, 64), (16, 16), tile=(8, 16)).block_map(n, n, block, block)
    assert np.count_nonzero(tiled) == math.prod(touched) == 220
    rows = neighborhood_mask((64, 64), (16, 16)).block_map(n, n, block, block)
    assert np.count_nonzero(rows) == 280


@pytest.mark.parametrize("tile", [3, (2, 3, 1), (2, 0)])
def test_tiles_that_do_not_fit(tile):
    for call in (
        lambda: to_tiles(jnp.zeros((1, 32)), (4, 8), tile),
        lambda: neighborhood_mask((4, 8), 2, tile=tile),
    ):
        with pytest.raises(ValueError, match="tile must"):
            call()
    with pytest.raises(ValueError, match=r"x must be \[B, 32, ...\], got shape \(1, 31\)"):
        from_tiles(jnp.zeros((1, 31)), (4, 8), 2)


def test_counts():
    shape, n = (8, 12), 96
    assert neighborhood_mask(shape, (3, 5), (2, 3), (2, 2)).count(n, n) == n * 15
    w, length = 4, 13
    assert neighborhood_mask(13, 4, causal=True).count(13, 13) == w * length - w * (w - 1) // 2
    leads = [min(i // 3 * 3 + 2, 12) for i in range(13)]
    want = sum(i - max(lead - w + 1, 0) + 1 for i, lead in enumerate(leads))
    assert neighborhood_mask(13, 4, 3, causal=True).count(13, 13) == want
    assert inward_window_mask((4, 7), (-1, 2)).count(28, 28) == 28 * 4 * 5
    assert axial_mask((4, 5)).count(20, 20) == 20 * (1 + 3 + 4)
    assert shifted_window_mask(12, 4, 1).count(12, 12) == 1 + 2 * 16 + 9
    assert block_local_mask(11, 4).count(11, 11) == 16 + 16 + 9
    sizes = [(4, 0), (4, 4), (3, 8)]
    want = sum(size * (min(c + 4 + 2, 11) - max(c - 2, 0)) for size, c in sizes)
    assert halo_mask(11, 4, 2).count(11, 11) == want


def test_limits_of_neighborhoods():
    shape, n = (4, 6), 24
    assert neighborhood_mask(shape, shape).dense(n, n).all()
    for block in (2, 3):
        windows = neighborhood_mask(12, block, block), block_local_mask(12, block)
        assert equal(*windows, 12)
    assert equal(inward_window_mask(shape, (-1, 1)), neighborhood_mask(shape, (4, 3)), n)
    dilated = np.asarray(neighborhood_mask(15, 3, dilation=3).dense(15, 15))
    plain = np.asarray(neighborhood_mask(5, 3).dense(5, 5))
    for group in range(3):
        assert (dilated[group::3, group::3] == plain).all()
    assert dilated.sum() == 3 * plain.sum()


def test_limits_of_windows():
    assert equal(
        halo_mask((4, 5), 1, 2), product_mask(*[sliding_window_mask(2, 2)] * 2, shape=(4, 5)), 20
    )
    assert equal(halo_mask((4, 6), (2, 3), 0), block_local_mask((4, 6), (2, 3)), 24)
    assert equal(shifted_window_mask((4, 6), 2, 0), block_local_mask((4, 6), 2), 24)


@pytest.mark.parametrize("shift", [0, 2])
def test_shifted_windows_are_the_regions_of_a_roll(shift):
    length, w = 12, 4
    rolled = (np.arange(length) - shift) % length
    region = np.where(rolled < length - w, 0, np.where(rolled < length - shift, 1, 2)) * (shift > 0)
    place = rolled // w * 3 + region
    want = place[:, None] == place
    assert (shifted_window_mask(length, w, shift).dense(length, length) == want).all()


@pytest.mark.parametrize("settings", [dict(decay=0.5, block=2), dict(decay=1.3, block=3)])
def test_radial_windows_pair_by_pair(settings):
    frames, tokens = 10, 6
    dense = np.asarray(radial_mask(frames, tokens, **settings).dense(60, 60))
    for i, j in np.ndindex(60, 60):
        d, apart = abs(i // tokens - j // tokens), abs(i % tokens - j % tokens)
        base = 2.0 ** (tokens.bit_length() - d.bit_length())
        width = max(settings["decay"] * base, settings["block"])
        split = base < settings["block"] and d % math.floor(settings["block"] / base)
        assert dense[i, j] == (j < tokens or d <= 1 or (apart <= width and not split)), (i, j)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: product_mask(causal_mask(), shape=(2, 3)), "masks must be one for each axis"),
        (lambda: product_mask(segment_mask(jnp.zeros((1, 3), int)), shape=2), "does not fit"),
        (lambda: neighborhood_mask(8, 5, dilation=2), "kernel must be at least 2 and"),
        (lambda: neighborhood_mask(8, 3, stride=4), "stride must be from 1 to the kernel 3"),
        (lambda: neighborhood_mask((8, 8), (3, 3, 3)), "kernel must be one value, or one for each"),
        (lambda: halo_mask(8, 0, 1), "block must be one value of at least 1"),
        (lambda: shifted_window_mask(9, 2, 1), "window must divide the length 9"),
        (lambda: radial_mask(2, 0), "must be at least 1"),
        (lambda: axial_mask(()), "shape must be the lengths"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
