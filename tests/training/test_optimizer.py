import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.training import make_optimizer, make_schedule
from attn_lab.training.optimizer import decay_mask


@settings(max_examples=10, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
    steps=st.integers(2, 500),
    data=st.data(),
)
def test_schedule_rises_then_falls_to_the_floor(schedule, steps, data):
    warmup = data.draw(st.integers(0, steps - 1))
    floor = data.draw(st.floats(0, 0.5))
    rate = make_schedule(steps, learning_rate=0.5, schedule=schedule, warmup=warmup, floor=floor)
    rates = np.array(rate(jnp.arange(steps + 1)))
    assert (np.diff(rates[: warmup + 1]) > 0).all() and (np.diff(rates[warmup:]) < 1e-7).all()
    np.testing.assert_allclose(rates[warmup], 0.5, rtol=1e-6)
    end = 0.5 if schedule == "constant" else floor
    np.testing.assert_allclose(rates[steps], end, rtol=1e-5, atol=1e-7)
    if warmup:
        np.testing.assert_allclose(rates[0], 0.5 / (warmup + 1), rtol=1e-6)


def test_cosine_stepped_once_per_epoch():
    rate = make_schedule(40, learning_rate=0.1, schedule="cosine", schedule_every=10)
    for step in range(40):
        expected = 0.1 * (1 + math.cos(math.pi * (step // 10) / 4)) / 2
        np.testing.assert_allclose(rate(jnp.array(step)), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"schedule": "cosin"}, "schedule must be one of constant, linear, cosine; got 'cosin'"),
        ({"warmup": 10}, r"warmup must be in \[0, steps=10\); got 10"),
        ({"schedule_every": 0}, "schedule_every must be at least 1; got 0"),
    ],
)
def test_bad_schedules(bad, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(10, learning_rate=0.1, **bad)


PARAMS = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "b": {"kernel": jnp.ones((3, 3))}}


@pytest.mark.parametrize(
    "decay, decayed",
    [
        (".*", {"a/kernel", "a/bias", "b/kernel"}),
        ("matrices", {"a/kernel", "b/kernel"}),
        ("^a/", {"a/kernel", "a/bias"}),
    ],
)
def test_decay_shrinks_what_is_chosen_and_nothing_else(decay, decayed):
    optimizer = make_optimizer(10, learning_rate=0.1, weight_decay=0.5, decay=decay)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    mask = decay_mask(PARAMS, decay)
    for layer, arrays in updates.items():
        for name, update in arrays.items():
            assert mask[layer][name] == (f"{layer}/{name}" in decayed)
            np.testing.assert_allclose(update, -0.05 * mask[layer][name], rtol=1e-6)


def test_adam_with_clipping_by_hand():
    b1, b2, eps, clip = 0.8, 0.9, 1e-8, 1.0
    optimizer = make_optimizer(10, learning_rate=0.1, betas=(b1, b2), eps=eps, clip=clip)
    rng = np.random.default_rng(0)
    p = rng.normal(size=4)
    params = jnp.float32(p)
    state = optimizer.init(params)
    m = v = 0.0
    for t in range(1, 6):
        g = rng.normal(size=4) * 10.0 ** (t - 3)
        updates, state = optimizer.update(jnp.float32(g), state, params)
        params = params + updates
        g = g / max(1, np.linalg.norm(g) / clip)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - 0.1 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    np.testing.assert_allclose(params, p, rtol=1e-4)
