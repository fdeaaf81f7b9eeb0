import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.objectives import expand_initial_state, initial_state_params


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_the_state_is_the_product_of_small_factors():
    a, b = initial_state_params(jax.random.key(0), 3, 40, 50, rank=2)
    assert (a.shape, b.shape) == ((3, 40, 2), (3, 2, 50))
    assert abs(a.std() - 0.02) < 0.003 and abs(b.std() - 0.02) < 0.003
    state = expand_initial_state(a.astype(jnp.bfloat16), b, 4)
    assert state.shape == (4, 3, 40, 50) and state.dtype == jnp.float32
    close(state[3], a.astype(jnp.bfloat16).astype(jnp.float32) @ b)
    assert jnp.linalg.matrix_rank(expand_initial_state(a, b, 1)[0, 0]) == 2


def test_outputs_are_affine_in_the_state():
    """`o_t(S_0) - o_t(0) = scale (q_t exp(b_t)) S_0`, b the sum of the log decays up to t."""
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 5, 3, 4))
    log_decay = jax.nn.log_sigmoid(k[..., ::-1])
    a, b = initial_state_params(jax.random.key(2), 3, 4, 4, scale=1.0)
    state = expand_initial_state(a, b, 2)
    run = jax.jit(lambda state: ops.gated_linear_attention(q, k, v, log_decay, initial_state=state))
    kept = q * jnp.exp(jnp.cumsum(log_decay, 1)) / 2
    close(run(state) - run(0 * state), jnp.einsum("bthd,bhde->bthe", kept, state))
    close(run(expand_initial_state(a, 0 * b, 2)), ops.gated_linear_attention(q, k, v, log_decay))


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        initial_state_params(jax.random.key(0), 2, 3, 4, rank=0)
    with pytest.raises(ValueError, match="a and b must be"):
        expand_initial_state(jnp.ones((2, 3, 1)), jnp.ones((2, 2, 4)), 1)
