import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.attention import Mask, operand
from attn_lab.ops import causal_mask, dense_mask, segment_mask, sliding_window_mask


def patterns():
    window = st.builds(sliding_window_mask, st.integers(-1, 5), st.integers(-1, 5))
    given = st.just(Mask(lambda b, h, q_index, k_index: (q_index * 7 + k_index * 5) % 3 == 0))
    return st.recursive(
        window | given,
        lambda inner: (
            st.builds(lambda a, b: a & b, inner, inner)
            | st.builds(lambda a, b: a | b, inner, inner)
            | st.builds(lambda a: ~a, inner)
        ),
        max_leaves=4,
    )


@settings(max_examples=30, deadline=None)
@given(
    patterns(),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(1, 5),
    st.data(),
)
def test_block_map_and_count_agree_with_dense(mask, q_len, k_len, block_q, block_k, data):
    if data.draw(st.booleans()):
        ids = jax.random.randint(jax.random.key(q_len), (2, q_len + k_len), 0, 2)
        mask = mask & segment_mask(ids[:, :q_len], ids[:, q_len:])
    dense = np.asarray(mask.dense(q_len, k_len))
    assert (mask.count(q_len, k_len) == dense.sum((-1, -2))).all()
    got = np.asarray(mask.block_map(q_len, k_len, block_q, block_k))
    for i, j in np.ndindex(got.shape[-2:]):
        tile = dense[..., i * block_q : (i + 1) * block_q, j * block_k : (j + 1) * block_k]
        want = np.where(tile.all((-1, -2)), 2, np.where(tile.any((-1, -2)), 1, 0))
        assert (got[..., i, j] == want).all()
    flipped = np.asarray((~mask).block_map(q_len, k_len, block_q, block_k))
    assert (flipped == 2 - got).all()


@settings(max_examples=15, deadline=None)
@given(patterns(), patterns(), st.integers(1, 9), st.integers(1, 9))
def test_algebra_is_pointwise(a, b, q_len, k_len):
    x, y = a.dense(q_len, k_len), b.dense(q_len, k_len)
    assert ((a & b).dense(q_len, k_len) == (x & y)).all()
    assert ((a | b).dense(q_len, k_len) == (x | y)).all()
    assert ((~a).dense(q_len, k_len) == ~x).all()
    assert (a | b).count(q_len, k_len) == a.count(q_len, k_len) + b.count(q_len, k_len) - (
        a & b
    ).count(q_len, k_len)


def test_leading_axes_are_those_that_the_mask_depends_on():
    assert causal_mask().dense(3, 5).shape == (3, 5)
    per_head = Mask(lambda b, h, q, k, w: q - k < w, (operand(jnp.arange(1, 3), "h"),))
    assert per_head.dense(4, 4).shape == (2, 4, 4) and per_head.count(4, 4).tolist() == [10, 13]
    segments = segment_mask(jnp.array([[0, 0, 1], [0, 1, 1]]))
    assert segments.dense(3, 3).shape == (2, 1, 3, 3)
    assert segments.block_map(3, 3, 2, 2).shape == (2, 1, 2, 2)


def test_counts_of_long_masks_need_no_square_array():
    n = 65536
    assert causal_mask().block_map(n, n, 512, 512).shape == (128, 128)
    assert causal_mask().count(n, n) == n * (n + 1) // 2
    assert sliding_window_mask(99, 0).count(n, n) == 100 * n - 99 * 50


def test_block_map_of_data_is_traceable():
    ids = jnp.array([[0, 0, 1, 1, 1]])
    mask = causal_mask() & segment_mask(ids)
    got = jax.jit(lambda m: m.block_map(5, 5, 2, 2))(mask)
    assert got.tolist() == [[1, 0, 0], [0, 1, 0], [0, 2, 2]]


def test_errors():
    with pytest.raises(ValueError, match="mask must be bool"):
        dense_mask(jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="does not fit lengths"):
        segment_mask(jnp.zeros((1, 3), int)).dense(4, 4)
    with pytest.raises(ValueError, match="axes must be distinct letters"):
        operand(jnp.zeros(3), "x")
    with pytest.raises(ValueError, match="one dimension for each"):
        operand(jnp.zeros(3), "hq")
