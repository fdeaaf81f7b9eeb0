import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.analysis import spectral_gap


def test_the_gap_of_known_chains():
    np.testing.assert_allclose(spectral_gap(jnp.full((5, 5), 0.2)), 1, atol=1e-6)
    np.testing.assert_allclose(spectral_gap(jnp.eye(4)), 0, atol=1e-6)
    np.testing.assert_allclose(spectral_gap(jnp.ones((2, 1, 1))), [1, 1])
    a, b = jnp.array([0.1, 0.9]), jnp.array([0.3, 0.6])
    chains = jnp.stack([jnp.stack([1 - a, a], -1), jnp.stack([b, 1 - b], -1)], -2)
    np.testing.assert_allclose(spectral_gap(chains), 1 - jnp.abs(1 - a - b), rtol=1e-5)
    cycle = jnp.roll(jnp.eye(5), 1, axis=1)  # complex eigenvalues of modulus 1
    np.testing.assert_allclose(spectral_gap(cycle), 0, atol=1e-5)


def test_the_gap_of_attention_falls_as_it_concentrates():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 8, 1, 4))
    v = jnp.eye(8)[None, :, None]
    gaps = [
        spectral_gap(ops.dot_product_attention(q, k, v, scale=scale)[0, :, 0])
        for scale in (0.0, 0.5, 4.0)
    ]
    assert gaps[0] > gaps[1] > gaps[2]
    with pytest.raises(ValueError, match="weights must be"):
        spectral_gap(jnp.ones((2, 3)))
