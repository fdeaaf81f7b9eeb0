import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def length(x):
    return jnp.sqrt((x**2).sum(-1))


def test_a_power_keeps_the_norm_and_sharpens(x64):
    x, gamma = jnp.abs(normal(0, 3, 4)) + 0.1, jnp.array([0.5, 2.0, 5.0])
    got = ops.norm_preserving_power(x, gamma, eps=0.0)
    close(length(got), length(x))
    close(ops.norm_preserving_power(x, jnp.ones(3), eps=0.0), x)
    top, before = got.max(-1) / length(got), x.max(-1) / length(x)
    assert top[0] < before[0] and (top[1:] > before[1:]).all()
    signed = ops.norm_preserving_power(normal(1, 3, 4), gamma, eps=0.0)
    close(length(signed), length(jax.nn.relu(normal(1, 3, 4))))


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1.0])
def test_eps_is_in_the_units_of_the_power(x64, size):
    """Values and gradients of the equation as it stands."""
    x, gamma = size * (jnp.abs(normal(0, 3, 4)) + 0.1), jnp.array([0.5, 2.0, 3.0])

    def direct(x, gamma):
        raised = x ** gamma[:, None]
        return raised / (length(raised) + 1e-6)[:, None] * length(x)[:, None]

    @functools.partial(jax.jit, static_argnums=0)
    def with_slopes(run):
        out, pull = jax.vjp(run, x, gamma)
        return out, *pull(jnp.cos(jnp.arange(12.0)).reshape(3, 4))

    for got, want in zip(with_slopes(ops.norm_preserving_power), with_slopes(direct)):
        close(got, want)


def test_powers_of_anything_are_finite_with_their_gradients():
    x = jnp.array([[1e9, 1e8, 0.0], [1e-9, 1e-8, -1.0], [0.0, 0.0, -1.0], [1e20, 1.0, 1e-20]])

    @jax.jit
    def with_slopes(x, gamma):
        out, pull = jax.vjp(ops.norm_preserving_power, x, gamma)
        return out, *pull(jnp.ones_like(out))

    for power in 0.5, 3.0, 40.0:
        out, slope, power_slope = with_slopes(x, jnp.full(4, power))
        assert all(jnp.isfinite(y).all() for y in (out, slope, power_slope))
        assert (out[2] == 0).all() and (slope[2] == 0).all() and power_slope[2] == 0
        close(out[3, 0] / 1e20, 1, 1e-5)


def test_hard_routes_take_the_best_and_pass_the_gradient_of_a_mixture(x64):
    logits, values, vectors = normal(0, 2, 5, 3), normal(1, 3), normal(2, 2, 5, 3, 4)
    best = logits.argmax(-1)
    got, pull = jax.vjp(ops.hard_route, logits, values)
    assert (got == values[best]).all()
    mixture = lambda logits, values: jax.nn.softmax(logits) @ values  # noqa: E731
    ct = normal(3, 2, 5)
    close(pull(ct)[0], jax.vjp(mixture, logits, values)[1](ct)[0])
    close(pull(ct)[1], jnp.stack([(ct * (best == n)).sum() for n in range(3)]))
    routed = ops.hard_route(logits, vectors)
    close(routed, jnp.take_along_axis(vectors, best[..., None, None], 2)[:, :, 0])
    with pytest.raises(ValueError, match="values must be"):
        ops.hard_route(logits, values[:2])


def example():
    shape = 2, 5, 3, 4
    q, k, v, q_redundant, k_redundant = (normal(n, *shape) for n in range(5))
    gates = [1 + jax.random.uniform(jax.random.key(n), shape[:3]) for n in range(6)]
    return [q, k, v, q_redundant, k_redundant, *gates]


def test_without_difference_and_power_it_is_rectified_linear_attention(x64):
    q, k, v, *rest = example()
    one, zero = jnp.ones((2, 5, 3)), jnp.zeros((2, 5, 3))
    got = ops.dynamic_differential_linear_attention(
        q, k, v, *rest[:2], one, one, *rest[4:6], zero, zero, eps=0.0
    )
    close(got, ops.linear_attention(q, k, v, feature_map="relu", normalization="none"))


def test_what_is_wholly_redundant_gives_nothing(x64):
    q, k, v, redundant, _, *gates = example()
    one = jnp.ones((2, 5, 3))
    gates = gates[0], gates[1], gates[2], gates[1], gates[4], one
    got = ops.dynamic_differential_linear_attention(q, k, v, redundant, k, *gates)
    assert (got == 0).all()


def test_errors_name_what_does_not_fit():
    arrays = example()
    for place, message in ((3, "q_redundant must be"), (5, "gamma must be"), (10, "lam_k")):
        wrong = [x[:, :4] if n == place else x for n, x in enumerate(arrays)]
        with pytest.raises(ValueError, match=message):
            ops.dynamic_differential_linear_attention(*wrong)
