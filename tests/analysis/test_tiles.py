import math

import golden
import jax
import pytest

from attn_lab.analysis import neighborhood_tile_speedup
from attn_lab.ops import neighborhood_mask


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_golden(wide):
    with jax.enable_x64(wide):
        golden.check("neighborhood_tile_simulator", wide)


def test_tiles_of_one_token_reach_the_ideal():
    axes = (4, 3), (2, 2), (1, 2), (True, False), (1, 1), (1, 1)
    visited, total, density, speedup = neighborhood_tile_speedup((8, 6), *axes)
    assert total == 48**2 and visited == neighborhood_mask((8, 6), *axes[:4]).count(48, 48)
    assert math.isclose(density * total, visited) and math.isclose(speedup, 1 / density)


def test_perfectly_sparse_blocks_lose_nothing():
    result = neighborhood_tile_speedup(
        (16, 8), (4, 8), (4, 2), (1, 1), (False, False), (4, 2), (2, 4)
    )
    visited, total, density, speedup = result
    assert (visited, total, density) == (4 * 2 * 4 * 2, 4 * 4 * 8 * 2, 0.25) and speedup == 4


def test_unaligned_tiles_lose_and_settings_are_checked():
    settings = (5,), (1,), (1,), (False,), (4,), (4,)
    _, _, density, speedup = neighborhood_tile_speedup((64,), *settings)
    assert 1 < speedup < 1 / density
    with pytest.raises(ValueError, match="q_tile must be one for each axis"):
        neighborhood_tile_speedup((64,), *settings[:4], (4, 4), (4,))
    with pytest.raises(ValueError, match="kernel must be at least 2"):
        neighborhood_tile_speedup((4,), *settings)
