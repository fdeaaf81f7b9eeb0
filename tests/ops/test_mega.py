import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def qkv(length=6, keys=6):
    return normal(0, 2, length, 2, 3), normal(1, 2, keys, 2, 3), normal(2, 2, keys, 2, 5)


def test_laplace_is_a_distribution_close_to_relu2_where_they_meet():
    mean = 0.707107
    np.testing.assert_allclose(ops.laplace(jnp.array(mean)), 0.5)
    np.testing.assert_allclose(ops.relu2(jnp.array(mean)), 0.5, rtol=1e-5)
    slopes = jax.grad(ops.laplace)(mean), jax.grad(ops.relu2)(mean)
    np.testing.assert_allclose(*slopes, rtol=1e-5)
    x = jnp.array([-jnp.inf, -1.5, 0.0, 1.5])
    assert (jnp.diff(ops.laplace(x)) > 0).all() and ops.laplace(x)[0] == 0
    for order in jax.grad(ops.laplace), jax.grad(jax.grad(ops.laplace)):
        assert order(-jnp.inf) == 0


@pytest.mark.parametrize("activation", ["laplace", "relu2", "softmax"])
@pytest.mark.parametrize("causal", [False, True])
def test_chunks_are_calls_of_their_own(activation, causal, x64):
    arrays, bias = qkv(), normal(3, 2, 2)
    run = functools.partial(ops.elementwise_attention, activation=activation, causal=causal)
    got = run(*arrays, bias, chunk_size=2)
    for start in 0, 2, 4:
        part = [x[:, start : start + 2] for x in arrays]
        close(got[:, start : start + 2], run(*part, bias))
    close(run(*arrays, chunk_size=7), run(*arrays))


def test_queries_divide_by_the_keys_that_they_see(x64):
    q, k, v = qkv(4, 6)
    run = functools.partial(ops.elementwise_attention, activation="relu2")
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.array([3, 4, 5, 6.0])[:, None]
    weights = jnp.tril(jnp.maximum(scores + 0.3, 0) ** 2, 2)
    want = jnp.einsum("bhts,bshd->bthd", weights, v)
    close(run(q, k, v, jnp.array(0.3), causal=True), want)
    close(run(q, k, v, jnp.array(0.3), mask=jnp.tri(4, 6, 2, dtype=bool)), want)
    real = jnp.arange(6) < 4
    close(run(q, k, v, mask=real), run(q, k[:, :4], v[:, :4]))
    close(run(q, k, v, mask=~real & real), 0)


def test_closed_gates_leave_the_stream_and_open_ones_replace_it():
    x, r, attended = jnp.ones((1, 2, 3)), 2 * jnp.ones((1, 2, 4)), 3 * jnp.ones((1, 2, 4))
    args = attended, r, -20 * x, jnp.full((1, 2, 3), -jnp.inf), jnp.ones((4, 3)), -jnp.ones(3)
    assert (ops.mega_gated_output(x, *args) == x).all()
    args = *args[:3], jnp.full((1, 2, 3), jnp.inf), *args[4:]
    np.testing.assert_allclose(ops.mega_gated_output(x, *args), jax.nn.silu(3.0), rtol=1e-6)


def test_first_scores_are_at_most_one_and_a_scale_of_zero_ends_them(x64):
    z, zeros = 10 * normal(0, 2, 5, 3, 4), jnp.zeros((2, 3, 4))
    q, k = ops.normalized_shared_qk(z, zeros, zeros)
    scores = jnp.einsum("bthd,bshd->bhts", q, k)
    assert scores.max() <= 1
    close(jnp.einsum("...ii->...i", scores), 1, atol=1e-4)
    beta = normal(1, 2, 3, 4)
    for got, want in zip(ops.normalized_shared_qk(z, zeros - 1, beta), beta):
        close(got, jnp.broadcast_to(want, z.shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activation": "relu"}, "activation must be one of laplace, relu2, softmax, got 'relu'"),
        ({"chunk_size": 4}, "chunk_size must divide the 6 queries"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.elementwise_attention(*(jnp.ones((1, 6, 1, 2)),) * 3, **arguments)
    with pytest.raises(ValueError, match="gamma must be"):
        ops.normalized_shared_qk(jnp.ones((1, 6, 1, 2)), jnp.ones((1, 2)), jnp.ones((2, 1, 2)))
