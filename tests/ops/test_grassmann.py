import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import grassmann_mixing, plucker_coordinates


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weights(channels=5, dim=4):
    pairs = dim * (dim - 1) // 2
    shapes = (channels, dim), (dim,), (pairs, channels), (channels,), (2 * channels, channels)
    return [normal(n, *shape) for n, shape in enumerate((*shapes, (channels,)))]


def test_coordinates_are_those_of_the_plane(x64):
    """Any basis of the same orientation has them; another orientation has their negatives."""
    a, b = normal(0, 2, 3, 5)
    got = plucker_coordinates(a, b)
    np.testing.assert_allclose(jnp.linalg.norm(got, axis=-1), 1)
    np.testing.assert_allclose(plucker_coordinates(b, a), -got)
    np.testing.assert_allclose(plucker_coordinates(2 * a + b, a + 3 * b), got, atol=1e-12)
    axes = jnp.eye(3)
    np.testing.assert_array_equal(plucker_coordinates(axes[0], axes[2]), [0, 1, 0])


def test_parallel_vectors_span_no_plane_and_have_a_gradient():
    a = normal(0, 4)
    np.testing.assert_array_equal(plucker_coordinates(a, a), 0)
    slopes = jax.grad(lambda a, b: plucker_coordinates(a, b).sum(), (0, 1))(a, a)
    assert all(jnp.isfinite(x).all() for x in slopes)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_it_is_the_mean_over_offsets_within_the_sequence(x64, length):
    h, offsets = normal(9, 2, length, 5), (1, 3, 9)
    w_red, b_red, w_plu, b_plu, w_gate, b_gate = weights()
    got = grassmann_mixing(h, *weights(), offsets=offsets)
    z = h @ w_red + b_red
    for t in range(length):
        planes = [plucker_coordinates(z[:, t], z[:, t - d]) for d in offsets if d <= t]
        g = jnp.stack([p @ w_plu + b_plu for p in planes]).mean(0) if planes else 0 * h[:, t]
        gate = jax.nn.sigmoid(jnp.concatenate([h[:, t], g], -1) @ w_gate + b_gate)
        np.testing.assert_allclose(got[:, t], gate * h[:, t] + (1 - gate) * g, atol=1e-12)


def test_equal_tokens_add_the_bias_alone():
    h = jnp.broadcast_to(normal(9, 5), (1, 4, 5))
    w = weights()
    w[4], w[5] = 0 * w[4], jnp.full(5, -1e4)  # the gate is shut
    got = grassmann_mixing(h, *w, offsets=(1,))
    np.testing.assert_allclose(got[:, 1:], jnp.broadcast_to(w[3], (1, 3, 5)), atol=1e-6)
    np.testing.assert_array_equal(got[:, 0], 0)


def test_errors():
    with pytest.raises(ValueError, match="offsets must be positive"):
        grassmann_mixing(jnp.ones((1, 2, 5)), *weights(), offsets=(0, 1))
    with pytest.raises(ValueError, match="r > 1"):
        plucker_coordinates(jnp.ones(3), jnp.ones(4))
