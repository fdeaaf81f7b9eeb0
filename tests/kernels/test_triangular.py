import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.recurrence import linear_attention
from attn_kernels.recurrence.triangular import unit_lower_inverse


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13])
def test_inverse(x64, size):
    matrix = jax.random.normal(jax.random.key(size), (3, 2, size, size))
    whole = jnp.eye(size) + jnp.tril(matrix, -1)
    got = unit_lower_inverse(matrix)
    np.testing.assert_allclose(got @ whole, jnp.broadcast_to(jnp.eye(size), got.shape), atol=1e-10)
    assert (jnp.triu(got, 1) == 0).all()


def test_repeated_keys_stay_exact_in_float32():
    """All keys alike, written at full strength: the hardest system that delta rules meet."""
    matrix, rhs = np.ones((64, 64)), np.random.default_rng(0).normal(size=(64, 4))
    exact = np.linalg.solve(np.eye(64) + np.tril(matrix, -1), rhs)
    inverse = unit_lower_inverse(jnp.asarray(matrix, jnp.float32))
    got = jnp.matmul(inverse, rhs.astype(np.float32), precision="highest")
    assert np.abs(got - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("form", ["chunk", "parallel"])
def test_no_solver_that_waits_for_its_own_thread_pool(form):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 1, 4))

    def loss(q, k, v):
        return linear_attention(q, k, v, beta=jnp.ones(q.shape[:3]), form=form).sum()

    assert "triangular_solve" not in str(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v))
