import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import base_conv, h3, hyena, linear_attention, long_conv, short_conv


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("taps", [1, 3, 9, 14])
def test_short_and_long_equal_the_sum(x64, taps):
    x, kernel = normal(0, 2, 9, 4), normal(1, taps, 4)
    want = np.zeros(x.shape)
    for t in range(9):
        for s in range(max(0, t - taps + 1), t + 1):
            want[:, t] += np.asarray(kernel[taps - 1 - (t - s)] * x[:, s])
    np.testing.assert_allclose(short_conv(x, kernel), want, atol=1e-12)
    for form in ("fft", "direct"):
        np.testing.assert_allclose(long_conv(x, kernel[::-1].T, form=form), want, atol=1e-12)


def test_short_conv_hands_its_state_over():
    x, kernel, bias, state = normal(0, 2, 9, 4), normal(1, 4, 4), normal(2, 4), jnp.zeros((2, 3, 4))
    parts = []
    for part in (x[:, :1], x[:, 1:3], x[:, 3:]):
        y, state = short_conv(part, kernel, bias, state=state)
        parts.append(y)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), short_conv(x, kernel, bias), atol=1e-6)
    np.testing.assert_array_equal(state, x[:, -3:])


def test_long_conv_forms_agree_with_gradients(x64):
    x, kernel, skip = normal(0, 2, 7, 3), normal(1, 3, 7), normal(2, 3)

    def gradient(form):
        loss = jax.jit(lambda *a: jnp.sin(long_conv(*a, form=form)).sum())
        return jax.grad(loss, (0, 1, 2))(x, kernel, skip)

    for a, b in zip(gradient("fft"), gradient("direct")):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_identities(x64):
    x = normal(0, 2, 7, 3)
    np.testing.assert_allclose(long_conv(x, jnp.eye(1, 5).repeat(3, 0)), x, atol=1e-12)
    zero, w, b = jnp.zeros(3), normal(1, 3, 3), normal(2, 3)
    np.testing.assert_array_equal(base_conv(x, normal(3, 3, 3), b, jnp.zeros((3, 3)), zero), x)
    got = base_conv(x, jnp.ones((1, 3)), zero, w, b)
    np.testing.assert_allclose(got, x * (x @ w + b) + x, atol=1e-12)


def test_h3_of_a_delta_and_of_ones_is_linear_attention(x64):
    """Heads of one channel, and of three, each of which keeps a matrix."""
    q, k, v = normal(0, 3, 2, 7, 6)
    zero, delta = jnp.zeros(6), jnp.eye(1, 7).repeat(6, 0)
    got = h3(q, k, v, delta, zero, jnp.ones((6, 7)), zero)
    np.testing.assert_allclose(got, q * jnp.cumsum(k * v, 1), atol=1e-12)
    got = h3(q, k, v, delta, zero, jnp.ones((2, 7)), zero[:2])
    heads = (x.reshape(2, 7, 2, 3) for x in (q, k, v))
    want = linear_attention(
        *heads, feature_map="identity", normalization="none", scale=1.0, causal=True
    )
    np.testing.assert_allclose(got, want.reshape(2, 7, 6), atol=1e-12)


def test_skips_of_h3_are_taps_at_the_present(x64):
    q, k, v = normal(0, 3, 2, 5, 6)
    (shift, skips), (diag, skip) = normal(1, 2, 6, 5), (normal(2, 3, 4), normal(3, 3))
    got = h3(q, k, v, shift, skips[:, 0], diag, skip)
    now = shift.at[:, 0].add(skips[:, 0]), jnp.zeros(6), diag.at[:, 0].add(skip), jnp.zeros(3)
    np.testing.assert_allclose(got, h3(q, k, v, *now, form="direct"), atol=1e-12)


def test_hyena_without_gates_is_a_convolution_and_gates_multiply(x64):
    x1, x2, v = normal(0, 3, 2, 7, 3)
    kernel, skip = normal(1, 3, 7), normal(2, 3)
    one = jnp.ones_like(v)
    np.testing.assert_allclose(hyena(one, one, v, kernel, skip), long_conv(v, kernel, skip))
    got = hyena(x1, x2, v, kernel, skip)
    want = x2 * long_conv(x1 * v, kernel, skip, form="direct")
    np.testing.assert_allclose(got, want, atol=1e-12)
    np.testing.assert_allclose(hyena(v, x2, x1, kernel, skip), got)


def test_errors():
    x = jnp.ones((2, 7, 3))
    with pytest.raises(ValueError, match="kernel"):
        short_conv(x, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="state"):
        short_conv(x, jnp.ones((4, 3)), state=jnp.ones((2, 4, 3)))
    with pytest.raises(ValueError, match="form"):
        long_conv(x, jnp.ones((3, 7)), form="slow")
    with pytest.raises(ValueError, match="skip"):
        long_conv(x, jnp.ones((3, 7)), jnp.ones(2))
    with pytest.raises(ValueError, match="proj_kernel"):
        base_conv(x, jnp.ones((3, 3)), jnp.ones(3), jnp.ones((3, 2)), jnp.ones(3))
    with pytest.raises(ValueError, match="H dividing C"):
        h3(x, x, x, jnp.ones((3, 7)), jnp.ones(3), jnp.ones((2, 7)), jnp.ones(2))
    with pytest.raises(ValueError, match="x1, x2 and v must agree"):
        hyena(x, x[:, :1], x, jnp.ones((3, 7)), jnp.ones(3))
