import jax.numpy as jnp
import numpy as np
import pytest
import tiles

from attn_lab.ops import (
    causal_mask,
    dense_mask,
    dot_product_attention,
    duo_causal_mask,
    head_masks,
    segment_mask,
    sliding_window_mask,
    token_match_mask,
)

IDS = jnp.array([[3, 1, 3, 2, 1], [0, 0, 0, 4, 4]])


def test_heads_have_patterns_of_their_own():
    parts = [causal_mask(), token_match_mask(IDS), causal_mask(), sliding_window_mask(1, 1)]
    mask = head_masks(parts)
    assert mask.dense(5, 5).shape == (2, 4, 5, 5)
    for h, part in enumerate(parts):
        assert (mask.dense(5, 5)[:, h] == part.dense(5, 5).reshape(-1, 5, 5)).all()
    assert mask.predicate == head_masks([*parts[:2], *parts[2:]]).predicate
    assert len(mask.predicate.predicates) == 3
    tiles.check(mask & causal_mask(), 5, 5, 2, 2)


def test_a_tile_that_all_heads_skip_is_surely_empty():
    mask = head_masks([causal_mask(), sliding_window_mask(2, 0)])
    assert mask.tile(0, 3, 4, 7) == (False, False)
    assert mask.tile(8, 11, 0, 3) == (True, False)


def test_heads_of_attention():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 5, 2, 4)), jnp.float32) for _ in range(3))
    parts = [causal_mask(), token_match_mask(IDS)]
    for implementation in ("definition", "xla"):
        run = dict(implementation=implementation)
        got = dot_product_attention(q, k, v, mask=head_masks(parts), **run)
        for h, part in enumerate(parts):
            one = slice(h, h + 1)
            want = dot_product_attention(*(x[:, :, one] for x in (q, k, v)), mask=part, **run)
            np.testing.assert_allclose(got[:, :, one], want, rtol=1e-5, atol=1e-6)


def test_one_depth_is_causal_and_first_depth_ignores_refined_keys():
    position, depth = jnp.array([0, 1, 1, 2, 3, 3]), jnp.array([0, 0, 1, 0, 0, 1])
    mask = duo_causal_mask(position, depth, position, depth)
    dense = np.asarray(mask.dense(6, 6))
    assert not dense[np.ix_(depth == 0, depth == 1)].any() and dense.diagonal().all()
    flat = duo_causal_mask(*[jnp.arange(4), jnp.zeros(4, int)] * 2)
    assert (flat.dense(4, 4) == causal_mask().dense(4, 4)).all()
    tiles.check(mask, 6, 6, 4, 4)


def test_errors():
    with pytest.raises(ValueError, match="masks must be one Mask for each head"):
        head_masks([])
    with pytest.raises(ValueError, match="masks must be one Mask for each head"):
        head_masks([jnp.ones((3, 3), bool)])
    with pytest.raises(ValueError, match="does not fit lengths"):
        segment_mask(IDS).count(4, 4)
    with pytest.raises(ValueError, match="a mask must be bool"):
        dense_mask(IDS)
