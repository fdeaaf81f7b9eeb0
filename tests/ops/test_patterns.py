import jax
import numpy as np
import pytest
import tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.ops import (
    causal_mask,
    global_window_mask,
    log_sparse_mask,
    offset_mask,
    power_mask,
    shifted_group_mask,
    sink_window_mask,
    sliding_window_mask,
    sparse_transformer_mask,
)

N = 29
i, j = np.arange(N)[:, None], np.arange(N)
PATTERNS = {
    "offset": (offset_mask(-1), j == i - 1),
    "sinks": (sink_window_mask(0, 3), (j <= i) & (j < 3)),
    "power": (power_mask(3, sinks=1, block=4), None),
    "log": (log_sparse_mask(), None),
    "strided": (sparse_transformer_mask(5, "strided"), None),
    "fixed": (sparse_transformer_mask(5, "fixed"), None),
    "global": (
        global_window_mask(2, 3, causal=True),
        (j <= i) & ((j < 2) | (i < 2) | (i - j <= 3)),
    ),
    "split": (shifted_group_mask(2, 6, sinks=2, causal=False), None),
    "roll": (shifted_group_mask(3, 5, "roll", shifted_heads=2, sinks=1, length=N), None),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_agree_with_the_dense_pattern(name):
    mask, want = PATTERNS[name]
    tiles.check(mask, N, N, 4, 3)
    if want is not None:
        assert (mask.dense(N, N) == want).all()


@pytest.mark.parametrize("name", sorted(set(PATTERNS) - {"roll"}))
def test_queries_align_at_the_end(name):
    mask, _ = PATTERNS[name]
    assert (mask.dense(5, N) == mask.dense(N, N)[..., -5:, :]).all()
    tiles.check(mask, 13, 7, 4, 4)


@pytest.mark.parametrize("name", PATTERNS)
def test_bounds_are_those_of_traced_ranges(name):
    mask, _ = PATTERNS[name]
    bounds = jax.jit(lambda *ranges: mask.tile(*ranges))
    for ranges in (8, 11, 4, 7), (0, 3, 24, 27), (28, 31, 0, 3), (5, 5, 4, 4):
        assert list(map(bool, bounds(*ranges))) == list(map(bool, mask.tile(*ranges)))


@settings(max_examples=6, deadline=None)
@given(
    st.recursive(
        st.sampled_from([mask for mask, _ in PATTERNS.values()]),
        lambda inner: (
            st.builds(lambda a, b: a & ~b, inner, inner)
            | st.builds(lambda a, b: a | b, inner, inner)
        ),
        max_leaves=3,
    ).filter(lambda mask: all(x.shape[1] in (1, 3) for x in mask.operands))
)
def test_tiles_of_expressions_agree_with_their_dense_form(mask):
    tiles.check(mask, N, N, 4, 6)


def test_counts():
    n, w, g, s, p = 40, 6, 8, 3, 5
    rows = range(n)
    sums = {
        sink_window_mask(w, s): sum(min(r + 1, w) + min(s, max(0, r + 1 - w)) for r in rows),
        power_mask(w): sum(min(r + 1, w) + sum(w <= 2**k <= r for k in range(9)) for r in rows),
        sparse_transformer_mask(p, "strided"): sum(min(r + 1, p) + r // p for r in rows),
        sparse_transformer_mask(p, "fixed"): sum(r % p + 1 + r // p for r in rows),
        sliding_window_mask(w, 2): n + sum(n - d for d in range(1, w + 1)) + n - 1 + n - 2,
    }
    for mask, want in sums.items():
        assert mask.count(n, n) == want
    half = g // 2
    plain, moved = n * (g + 1) // 2, half * (half + 1) + (n // g - 1) * g * (g + 1) // 2
    assert shifted_group_mask(4, g).count(n, n).tolist() == [plain, plain, moved, moved]
    assert causal_mask().count(7, n) == 7 * (n - 7) + 7 * 8 // 2


def test_limits():
    n = 16
    causal, dense = causal_mask().dense(n, n), lambda mask: mask.dense(n, n)
    assert (dense(sink_window_mask(n, 0)) == causal).all()
    assert (dense(sink_window_mask(5, 0)) == dense(sliding_window_mask(4, 0))).all()
    assert (dense(shifted_group_mask(1, n)) == causal).all()
    assert (dense(log_sparse_mask()) == dense(power_mask(1))).all()
    split, roll = (shifted_group_mask(2, 4, v, 0, length=n) for v in ("split", "roll"))
    assert (dense(split) == dense(roll)).all()


def test_two_layers_of_powers_reach_all_distances_of_two_bits():
    n = 64
    step = np.asarray(power_mask(1).dense(n, n), int)
    reached = (step @ step)[-1, ::-1] > 0
    assert [int(d) for d in np.flatnonzero(reached)] == [d for d in range(n) if d.bit_count() <= 2]


def test_rolled_groups_leak_the_end_of_the_sequence():
    allowed = np.asarray(shifted_group_mask(2, 8, "roll", length=16).dense(16, 16))
    assert not np.triu(allowed[0], 1).any()
    assert allowed[1][0, 12:].all() and not allowed[1][12, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sink_window_mask(-1, 2), "window must be at least 0, got -1"),
        (lambda: power_mask(1, block=0), "block must be at least 1, got 0"),
        (lambda: sparse_transformer_mask(4, "dilated"), "kind must be 'strided' or 'fixed'"),
        (lambda: shifted_group_mask(2, 4, "roll"), "length must be given"),
        (lambda: shifted_group_mask(2, 4, "swin"), "variant must be"),
        (lambda: shifted_group_mask(2, 4, shifted_heads=3), "shifted_heads must be at most 2"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
