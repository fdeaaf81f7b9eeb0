import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.tasks import accuracy, cross_entropy
from attn_lab.training import cross_entropy as summed


def test_accuracy_weighs_examples_equally():
    targets = jnp.array([[1, 2, 3, 4], [5, -100, -100, -100], [-100, -100, -100, -100]])
    predictions = jnp.array([[1, 0, 0, 0], [5, 9, 9, 9], [7, 7, 7, 7]])
    assert accuracy(predictions, targets) == (1 / 4 + 1) / 2


def test_accuracy_of_logits_is_that_of_their_argmax():
    logits = jax.random.normal(jax.random.key(0), (3, 5, 7))
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 7)
    targets = jnp.where(targets == 0, -100, logits.argmax(-1)).at[0].set(6)
    assert accuracy(logits, targets) == accuracy(logits.argmax(-1), targets) < 1


def test_cross_entropy_is_the_mean_over_labels_and_ignores_the_rest():
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 6, 9))
    targets = jax.random.randint(jax.random.key(1), (4, 6), 0, 9).at[1:, 2:].set(-100)
    labelled = np.argwhere(np.asarray(targets) >= 0)
    probabilities = np.asarray(jax.nn.softmax(logits))
    want = -np.mean([np.log(probabilities[i, j, targets[i, j]]) for i, j in labelled])
    np.testing.assert_allclose(cross_entropy(logits, targets), want, rtol=1e-6)
    total, weight = summed(logits, targets)["loss"]
    np.testing.assert_allclose(total / weight, want, rtol=1e-6)
    gradient = jax.grad(cross_entropy)(logits, targets)
    assert not gradient[1:, 2:].any() and gradient[0].any()


@pytest.mark.parametrize("metric", [accuracy, cross_entropy])
def test_shapes_that_do_not_match(metric):
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        metric(jnp.zeros((2, 4, 5)), jnp.zeros((2, 3), int))
