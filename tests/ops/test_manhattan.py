import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def qkv(rows=3, columns=4, heads=2, dim=5, v_dim=3):
    return tuple(normal(n, 2, rows, columns, heads, d) for n, d in enumerate((dim, dim, v_dim)))


def flat(x):
    return x.reshape(x.shape[0], -1, *x.shape[3:])


GAMMA = np.log([0.5, 0.9])
attend = jax.jit(ops.manhattan_attention, static_argnames=("decomposed", "activation", "scale"))


def test_without_decay_it_is_plain_attention(x64):
    q, k, v = qkv()
    want = ops.dot_product_attention(flat(q), flat(k), flat(v)).reshape(v.shape)
    close(attend(q, k, v, jnp.zeros(2)), want)


@pytest.mark.parametrize("decomposed", [False, True])
def test_a_single_row_and_a_strong_decay(decomposed, x64):
    q, k, v = qkv(rows=1)
    whole = attend(q, k, v, GAMMA)
    close(attend(q, k, v, GAMMA, decomposed=decomposed), whole)
    bias = jnp.abs(jnp.arange(4)[:, None] - jnp.arange(4)) * GAMMA[:, None, None]
    close(whole, ops.dot_product_attention(flat(q), flat(k), flat(v), bias=bias)[:, None])
    q, k, v = qkv()
    run = lambda gamma: attend(q, k, v, gamma, decomposed=decomposed)  # noqa: E731
    none = jnp.full(2, -jnp.inf)
    close(run(none), v)
    assert jnp.isfinite(jax.grad(lambda gamma: run(gamma).sum())(none)).all()


def test_decays_of_the_two_passes_multiply(x64):
    """With scores of 0 and by columns of the identity, the weights are products of both decays."""
    rows, columns = 3, 4
    unit = jnp.eye(rows * columns).reshape(1, rows, columns, 1, rows * columns)
    zero, gamma = jnp.zeros((1, rows, columns, 1, 2)), jnp.array([-0.4])
    part = dict(decomposed=True, activation="sigmoid")
    weights = flat(attend(zero, zero, unit, gamma, **part))[0, :, 0]
    y, x = np.divmod(np.arange(rows * columns), columns)
    distance = abs(y[:, None] - y) + abs(x[:, None] - x)
    close(weights, 0.25 * np.exp(-0.4 * distance))


@pytest.mark.parametrize("decomposed", [False, True])
def test_sigmoid_weights_lean_by_their_slopes(decomposed, x64):
    q, k, v = qkv(rows=1)
    slopes = jnp.array([0.5, -0.25])
    got = attend(
        q, k, v, GAMMA, decomposed=decomposed, activation="sigmoid", slopes=slopes, scale=0.3
    )
    apart = jnp.arange(4)[:, None] - jnp.arange(4)
    scores = 0.3 * jnp.einsum("bthd,bshd->bhts", flat(q), flat(k))
    weights = jax.nn.sigmoid(scores + slopes[:, None, None] * apart)
    weights = weights * jnp.exp(GAMMA[:, None, None] * abs(apart))
    want = jnp.einsum("bhts,bshd->bthd", weights, flat(v))
    if decomposed:
        own = 0.3 * jnp.einsum("bthd,bthd->bth", flat(q), flat(k))
        want = jax.nn.sigmoid(own)[..., None] * want
    close(got, want[:, None])


def test_decays_of_heads_and_the_other_name():
    close(ops.manhattan_decay(4), jnp.log(1 - 2.0 ** -jnp.array([2.0, 3, 4, 5])), 1e-6)
    q, k, v = qkv()
    want = attend(q, k, v, GAMMA, decomposed=True)
    assert (ops.decomposed_manhattan_attention(q, k, v, GAMMA) == want).all()


def test_errors_name_the_argument():
    q, k, v = qkv()
    for arguments, message in (
        (dict(activation="relu"), "activation must be one of softmax, sigmoid"),
        (dict(slopes=GAMMA), "slopes need activation='sigmoid'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.manhattan_attention(q, k, v, GAMMA, **arguments)
    with pytest.raises(ValueError, match=r"log_gamma must be \[H\] = \[2\]"):
        ops.manhattan_attention(q, k, v, GAMMA[:1])
    with pytest.raises(ValueError, match=r"k must be \[B, Y, X, H, D\]"):
        ops.manhattan_attention(q, k[:, 1:], v, GAMMA)
