import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import selective_lookup

X, UPDATE = jax.random.normal(jax.random.key(0), (2, 2, 5, 3))
SCORES = jnp.array([[0.1, 0.9, 0.5, 0.9, 0.2], [0.3, 0.3, 0.3, 0.3, 0.3]])


def test_only_the_largest_are_updated_the_first_of_equals():
    got = selective_lookup(X, UPDATE, SCORES, num_selected=3)
    chosen = jnp.array([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0]], bool)[..., None]
    want = jnp.where(chosen, X + SCORES[..., None] * UPDATE, X)
    np.testing.assert_array_equal(got, want)


def test_none_and_all():
    soft = selective_lookup(X, UPDATE, SCORES)
    np.testing.assert_array_equal(selective_lookup(X, UPDATE, SCORES, num_selected=9), soft)
    np.testing.assert_array_equal(selective_lookup(X, UPDATE, SCORES, num_selected=0), X)
    np.testing.assert_array_equal(selective_lookup(X, UPDATE, jnp.ones((2, 5))), X + UPDATE)


def test_scores_that_are_not_chosen_have_no_gradient():
    loss = lambda scores: selective_lookup(X, UPDATE, scores, num_selected=3).sum()  # noqa: E731
    slopes = jax.grad(loss)(SCORES)
    np.testing.assert_array_equal(slopes[0, jnp.array([0, 4])], 0)
    np.testing.assert_allclose(slopes[0, 1:4], UPDATE.sum(-1)[0, 1:4], rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="num_selected must not be negative"):
        selective_lookup(X, UPDATE, SCORES, num_selected=-1)
    with pytest.raises(ValueError, match=r"scores \[B, T\]"):
        selective_lookup(X, UPDATE, SCORES[:, :3])
