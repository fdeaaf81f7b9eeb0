import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def example():
    q, k, v = normal(0, 2, 5, 4, 3), normal(1, 2, 6, 2, 3), normal(2, 2, 6, 2, 3)
    return q, k, v, [normal(n, 2, 3) for n in range(3, 7)]


def fourier(q, k, v, norms):
    return ops.fourier_attention(q, k, v, *(jnp.repeat(x, 2, 0) for x in norms[:2]), *norms[2:])


def galerkin(q, k, v, norms):
    return ops.galerkin_attention(q, k, v, *norms)


@pytest.mark.parametrize("attend", [galerkin, fourier])
def test_a_grid_twice_as_fine_of_the_same_values_changes_nothing(x64, attend):
    q, k, v, norms = example()
    want = attend(q, k, v, norms)
    close(attend(q, jnp.repeat(k, 2, 1), jnp.repeat(v, 2, 1), norms), want)
    order = jnp.array([3, 5, 0, 1, 4, 2])
    close(attend(q[:, ::-1], k[:, order], v[:, order], norms)[:, ::-1], want)


def test_galerkin_attention_is_linear_in_queries(x64):
    q, k, v, norms = example()
    other = normal(9, *q.shape)
    want = galerkin(q, k, v, norms) + 2 * galerkin(other, k, v, norms)
    close(galerkin(q + 2 * other, k, v, norms), want)


def test_fourier_attention_is_its_kernel(x64):
    q, k, v, norms = example()
    queries = ops.head_layer_norm(q, *(jnp.repeat(x, 2, 0) for x in norms[:2]))
    keys, values = (jnp.repeat(x, 2, 2) for x in (ops.head_layer_norm(k, *norms[2:]), v))
    kernel = jnp.einsum("bthd,bshd->bhts", queries, keys) / 3**0.5 / 6
    close(fourier(q, k, v, norms), jnp.einsum("bhts,bshd->bthd", kernel, values))


def test_the_norm_of_a_head_is_its_own(x64):
    x, weight, bias = normal(0, 2, 5, 2, 3), normal(1, 2, 3), normal(2, 2, 3)
    got = ops.head_layer_norm(x, weight, bias, eps=0.0)
    plain = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    close(got, plain * weight + bias)
    close(
        ops.head_layer_norm(x[:, :, :1], weight, bias, eps=0.0)[:, :, 1],
        (plain[:, :, 0] * weight[1] + bias[1]),
    )
    flat = jax.grad(lambda x: ops.head_layer_norm(x, weight, bias, eps=0.0).sum())(0 * x)
    assert jnp.isfinite(flat).all()
    with pytest.raises(ValueError, match="bias must be"):
        ops.head_layer_norm(x, weight, bias[0])
