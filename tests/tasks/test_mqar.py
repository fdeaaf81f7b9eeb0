import itertools
from collections import Counter

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.tasks import mqar, mqar_assemble, mqar_slot_probabilities


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("stem", ["mqar_assemble", "mqar_slot_probabilities"])
def test_golden(stem, wide):
    with jax.enable_x64(wide):
        golden.check(stem, wide)


@st.composite
def sizes(draw):
    pairs, passes = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    slots = draw(st.integers(pairs, 12))
    return dict(seq_len=2 * (pairs * passes + slots), num_kv_pairs=pairs, num_passes=passes)


@given(sizes(), st.integers(0, 2**31 - 1), st.booleans())
@settings(max_examples=8, deadline=None)
def test_structure(size, seed, random_fill):
    vocab, batch = 100, 7
    out = mqar(jax.random.key(seed), batch, **size, vocab=vocab, random_fill=random_fill)
    inputs, targets = (np.asarray(out[name]) for name in ("inputs", "targets"))
    assert inputs.shape == targets.shape == (batch, size["seq_len"])
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.min() >= 0 and inputs.max() < vocab
    pairs, context = size["num_kv_pairs"], 2 * size["num_kv_pairs"] * size["num_passes"]
    for x, y in zip(inputs, targets):
        passes = x[:context].reshape(size["num_passes"], pairs, 2)
        assert (passes == passes[0]).all()
        keys, values = passes[0].T
        assert set(keys) <= set(range(1, vocab // 2)) and len(set(keys)) == pairs
        assert set(values) <= set(range(vocab // 2, vocab)) and len(set(values)) == pairs
        (asked,) = np.nonzero(y != -100)
        assert (asked >= context).all() and (asked % 2 == 0).all()
        assert dict(zip(x[asked], y[asked])) == dict(zip(keys, values)) and len(asked) == pairs
        rest = np.setdiff1d(np.arange(context, size["seq_len"]), asked)
        assert random_fill or not x[rest].any()


def test_the_rule_that_defines_the_task_is_always_right():
    out = mqar(jax.random.key(3), 50, seq_len=64, num_kv_pairs=8, vocab=128, random_fill=False)
    inputs, targets = (np.asarray(out[name]) for name in ("inputs", "targets"))
    for row, position in np.argwhere(targets >= 0):
        (place,) = np.nonzero(inputs[row, :16:2] == inputs[row, position])
        assert inputs[row, 2 * place[0] + 1] == targets[row, position]


def test_a_key_gives_one_batch():
    draw = lambda seed: mqar(jax.random.key(seed), 4, vocab=100)["inputs"]  # noqa: E731
    assert (draw(0) == draw(0)).all()
    assert (draw(0) != draw(1)).any()


def test_queries_follow_the_slot_law():
    """Both the first draw and the draws without replacement, against enumeration."""
    batch, pairs, length = 20_000, 2, 16
    law = np.asarray(mqar_slot_probabilities(length, pairs, power=0.3), np.float64)
    out = mqar(
        jax.random.key(0), batch, seq_len=length, num_kv_pairs=pairs, vocab=64, power=0.3,
        random_fill=False,
    )  # fmt: skip
    inputs = np.asarray(out["inputs"])
    seen = Counter()
    for x in inputs:
        slots = [int(np.nonzero(x[4:] == x[2 * j])[0][0]) // 2 for j in range(pairs)]
        seen[tuple(slots)] += 1
    for first, second in itertools.permutations(range(len(law)), 2):
        want = law[first] * law[second] / (1 - law[first])
        deviation = np.sqrt(want * (1 - want) / batch)
        assert abs(seen[first, second] / batch - want) < 5 * deviation, (first, second)


def test_keys_values_and_their_pairing_are_uniform():
    batch = 20_000
    out = mqar(jax.random.key(1), batch, seq_len=8, num_kv_pairs=2, vocab=10, random_fill=False)
    tuples = Counter(map(tuple, np.asarray(out["inputs"])[:, :4].tolist()))
    keys, values = range(1, 5), range(5, 10)
    possible = [
        (k, v, m, w)
        for k, m in itertools.permutations(keys, 2)
        for v, w in itertools.permutations(values, 2)
    ]
    assert set(tuples) == set(possible)
    want = batch / len(possible)
    chi_squared = sum((tuples[t] - want) ** 2 / want for t in possible)
    degrees = len(possible) - 1
    assert abs(chi_squared - degrees) < 5 * np.sqrt(2 * degrees)


def test_fill_is_uniform_over_all_ids():
    out = mqar(jax.random.key(2), 4000, seq_len=16, num_kv_pairs=1, vocab=20)
    inputs, targets = (np.asarray(out[name])[:, 2:] for name in ("inputs", "targets"))
    counts = np.bincount(inputs[targets < 0], minlength=20)
    want = counts.sum() / 20
    assert (abs(counts - want) < 5 * np.sqrt(want)).all()


def test_slot_probabilities():
    uniform = mqar_slot_probabilities(20, 2, power=1.0)
    np.testing.assert_allclose(uniform, np.full(8, 1 / 8), rtol=1e-6)
    crowded = mqar_slot_probabilities(20, 2, power=0.01, num_passes=2)
    assert crowded.shape == (6,)
    np.testing.assert_allclose(crowded.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(crowded[0] / crowded[3], 4**0.99, rtol=1e-5)


@given(sizes(), st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_assemble_under_jit_agrees_with_a_loop(size, seed):
    rng = np.random.default_rng(seed)
    pairs, passes, length = size["num_kv_pairs"], size["num_passes"], size["seq_len"]
    context = 2 * pairs * passes
    keys = np.stack([rng.permutation(np.arange(1, 30))[:pairs] for _ in range(3)])
    values = np.stack([rng.permutation(np.arange(30, 60))[:pairs] for _ in range(3)])
    slots = np.stack([rng.permutation((length - context) // 2)[:pairs] for _ in range(3)])
    inputs, targets = np.zeros((3, length)), np.full((3, length), -100)
    for b in range(3):
        for n in range(passes):
            for j in range(pairs):
                inputs[b, 2 * (n * pairs + j)] = keys[b, j]
                inputs[b, 2 * (n * pairs + j) + 1] = values[b, j]
        for j in range(pairs):
            inputs[b, context + 2 * slots[b, j]] = keys[b, j]
            targets[b, context + 2 * slots[b, j]] = values[b, j]
    got = jax.jit(lambda *a: mqar_assemble(*a, length, num_passes=passes))(keys, values, slots)
    np.testing.assert_array_equal(got[0], inputs)
    np.testing.assert_array_equal(got[1], targets)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 63}, "seq_len.*63"),
        ({"num_kv_pairs": 17}, "seq_len.*68.*64"),
        ({"num_passes": 8}, "seq_len.*72.*64"),
        ({"num_kv_pairs": 0}, "num_kv_pairs"),
        ({"vocab": 64}, "vocab.*64"),
        ({"power": 0.0}, "power"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        mqar(jax.random.key(0), 2, **changes)


def test_assemble_wants_one_shape():
    ids = jnp.ones((2, 3), int)
    with pytest.raises(ValueError, match="keys, values and slots"):
        mqar_assemble(ids, ids[:, :2], ids, 32)
