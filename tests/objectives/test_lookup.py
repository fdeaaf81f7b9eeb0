import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.objectives import lookup_penalty


def test_only_look_ups_beyond_the_wanted_cost():
    scores = jnp.array([[0.5, 0.7, 0.0, 0.4], [0.9, 0.9, 0.2, 0.4]])
    got = lookup_penalty(scores, num_lookups=1, weight=0.1)
    np.testing.assert_allclose(got, 0.1 * (0.5 - 0.25), rtol=1e-6)
    np.testing.assert_allclose(lookup_penalty(scores, num_lookups=1), 1e-3 * 0.25, rtol=1e-6)
    assert lookup_penalty(scores, num_lookups=3) == 0
    slopes = jax.grad(lambda scores: lookup_penalty(scores, num_lookups=1, weight=0.1))(scores)
    np.testing.assert_allclose(slopes, 0.1 / 8, rtol=1e-6)


def test_scores_are_of_tokens():
    with pytest.raises(ValueError, match=r"scores must be \[B, T\]"):
        lookup_penalty(jnp.ones(3), num_lookups=1)
