import jax
import jax.numpy as jnp
import pytest

from attn_lab import ops

SCORES = jax.random.normal(jax.random.key(0), (2, 3, 9, 9))


def same(mask, other):
    return (jnp.broadcast_to(mask.dense(9, 9), (2, 3, 9, 9)) == other.dense(9, 9)).all()


def test_types_of_one_kind():
    shape = 2, 9, 3
    assert same(ops.token_type_mask(jnp.zeros(shape, int), window=2), ops.causal_mask())
    assert same(ops.token_type_mask(jnp.ones(shape, int), window=2), ops.causal_mask())
    sliding = ops.token_type_mask(jnp.full(shape, 2), window=2)
    assert same(sliding, ops.sliding_window_mask(2, 0))


def test_local_tokens_end_at_the_next_global_one():
    types = jnp.ones((1, 9, 1), int).at[0, 4].set(0)
    dense = ops.token_type_mask(types, window=0).dense(9, 9)
    assert dense[:5, 0].all() and not dense[5:, 0].any() and dense[4:, 4].all()
    assert dense[8, 5:].all()


@pytest.mark.parametrize("mask", [ops.heavy_hitter_mask, ops.heavy_hitter_static_mask])
def test_many_or_no_heavy_hitters(mask):
    assert same(mask(SCORES, heavy=9, recent=0), ops.causal_mask())
    assert same(mask(SCORES, heavy=0, recent=3), ops.sliding_window_mask(3, 0))


def test_a_query_sees_a_full_cache_and_itself_but_nothing_that_was_dropped():
    seen = ops.heavy_hitter_mask(SCORES, heavy=2, recent=2).dense(9, 9)
    assert (seen.sum(-1) == jnp.minimum(jnp.arange(1, 10), 5)).all()
    later = seen[:, :, 1:] & ~seen[:, :, :-1]
    assert (later == jnp.eye(9, dtype=bool)[1:]).all()


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="types must be integers"):
        ops.token_type_mask(jnp.zeros((2, 9)), window=1)
    with pytest.raises(ValueError, match="scores must be \\[B, H, T, T\\]"):
        ops.heavy_hitter_mask(SCORES[..., :3], heavy=1, recent=1)
