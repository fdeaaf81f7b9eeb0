import dataclasses
import time
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.attention import Mask, operand
from attn_kernels.attention import mask as mask_module
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


LENGTHS = st.sampled_from([1, 7, 12])


@settings(max_examples=8, deadline=None)
@given(patterns(), LENGTHS, LENGTHS, st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_block_map_and_count_agree_with_dense(mask, q_len, k_len, block_q, block_k, segments):
    if segments:
        ids = jax.random.randint(jax.random.key(q_len), (2, q_len + k_len), 0, 2)
        mask = mask & segment_mask(ids[:, :q_len], ids[:, q_len:])
    tiles.check(mask, q_len, k_len, block_q, block_k)


@settings(max_examples=8, deadline=None)
@given(patterns(), patterns(), LENGTHS, LENGTHS)
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


@pytest.mark.parametrize("narrow", [False, True], ids=["window", "window_without_a_band"])
def test_a_million_tokens_take_under_a_second_and_little_memory(narrow):
    """The count of the second one is that of two windows, by tiles that have to be cut up."""
    n, left, inner = 1 << 20, 4095, 99
    mask = sliding_window_mask(left, 0)
    total = (left + 1) * n - left * (left + 1) // 2
    if narrow:
        mask &= ~sliding_window_mask(inner, 0)
        total -= (inner + 1) * n - inner * (inner + 1) // 2
    assert total > 2**31
    mask.block_map(64, 64, 8, 8)
    seconds, peaks = [], []
    for _ in range(2):
        tracemalloc.start()
        start = time.perf_counter()
        got = np.asarray(mask.block_map(n, n, 1024, 1024))
        seconds.append(time.perf_counter() - start)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(seconds) < 1 and max(peaks) < 100e6
    assert (np.diag(got) == 1).all() and (np.diag(got, -2) == 2).all()
    assert (
        (np.diag(got, -4) == 1).all() and not np.triu(got, 1).any() and not np.tril(got, -5).any()
    )
    tracemalloc.start()
    count = mask.count(n, n)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert count == total and count.dtype == np.int64


def test_the_predicate_is_evaluated_on_parts_of_open_tiles_only():
    """Parts of a block that are full and empty by their bounds settle it without a look."""

    @dataclasses.dataclass(frozen=True)
    class Bounded:
        def __call__(self, b, h, q_index, k_index):
            raise AssertionError("evaluated")

        def tile(self, q_first, q_last, k_first, k_last):
            return sliding_window_mask(200, 0).tile(q_first, q_last, k_first, k_last)

    lengths = 1024, 1024, 512, 512
    assert Mask(Bounded()).block_map(*lengths).tolist() == [[1, 0], [1, 1]]
    with pytest.raises(AssertionError, match="evaluated"):
        Mask(Bounded()).count(1024, 1024)


def test_block_maps_need_few_temporaries():
    """The compiled evaluation of open tiles holds a number of pairs that does not grow with T."""
    starts = [jax.ShapeDtypeStruct((1 << 16,), jnp.int32)] * 4
    shape = (1, 1, mask_module.LEAF, mask_module.LEAF)
    lowered = mask_module._count.lower(causal_mask(), 0, starts, shape=shape)
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 16e6


def test_bounds_hold_under_jit():
    """Block maps of static masks are known while tracing, complements included."""
    mask = ~causal_mask() | sliding_window_mask(2, 2)
    got = jax.jit(lambda: mask.block_map(12, 12, 4, 4))()
    assert (got == mask.block_map(12, 12, 4, 4)).all()


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
