import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab.training import cross_entropy


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1, 0.5]))
def test_sums_over_the_labelled_positions(seed, smoothing):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, 5, 7)) * 4
    targets = np.where(rng.random((3, 5)) < 0.4, -100, rng.integers(7, size=(3, 5)))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    loss = correct = count = 0.0
    for index in np.ndindex(3, 5):
        if targets[index] != -100:
            hot = (1 - smoothing) * np.eye(7)[targets[index]] + smoothing / 7
            loss -= (hot * np.log(p[index])).sum()
            correct += p[index].argmax() == targets[index]
            count += 1
    sums = cross_entropy(jnp.float32(logits), jnp.array(targets), label_smoothing=smoothing)
    np.testing.assert_allclose(sums["loss"], (loss, count), rtol=1e-5)
    np.testing.assert_allclose(sums["accuracy"], (correct, count))


def test_computed_in_float32_and_finite_at_extremes():
    logits = jnp.array([[3e38, -3e38, 0.0]], jnp.bfloat16)
    loss, _ = cross_entropy(logits, jnp.array([0]))["loss"]
    assert loss.dtype == jnp.float32 and loss == 0
    grad = jax.grad(lambda x: cross_entropy(x, jnp.array([-100]))["loss"][0])(logits)
    assert not np.asarray(grad, np.float32).any()


def test_shapes_that_do_not_match():
    with pytest.raises(ValueError, match=r"targets .* \(2, 3\); got \(3, 2\)"):
        cross_entropy(jnp.zeros((2, 3, 4)), jnp.zeros((3, 2), int))
