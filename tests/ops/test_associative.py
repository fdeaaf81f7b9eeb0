import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import gated_associative_memory, short_conv


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, MEMORY, KERNEL, BIAS = normal(0, 2, 7, 4), normal(1, 5, 4), normal(2, 3, 4), normal(3, 4)
SHUT, OPEN = jnp.full(4, -1e4), jnp.full(4, 1e4)


def run(x, memory, local, glob):
    gates = jnp.zeros((4, 8)), jnp.concatenate([local, glob])
    return gated_associative_memory(x, memory, KERNEL, BIAS, *gates)


def test_gates_choose_the_paths():
    np.testing.assert_array_equal(run(X, MEMORY, SHUT, SHUT), 0)
    local, glob = run(X, MEMORY, OPEN, SHUT), run(X, MEMORY, SHUT, OPEN)
    np.testing.assert_array_equal(local, short_conv(X, KERNEL, BIAS))
    want = jax.nn.softmax(X @ MEMORY.T, -1) @ MEMORY
    np.testing.assert_allclose(glob, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(run(X, MEMORY, OPEN, OPEN), local + glob, rtol=1e-6, atol=1e-6)


def test_the_memory_is_read_by_every_token_alone():
    got = run(X[:, ::-1], MEMORY, SHUT, OPEN)[:, ::-1]
    np.testing.assert_allclose(got, run(X, MEMORY, SHUT, OPEN), rtol=1e-6, atol=1e-6)
    one = run(X, MEMORY[:1], SHUT, OPEN)
    np.testing.assert_allclose(one, jnp.broadcast_to(MEMORY[0], X.shape), rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"memory must be \[M, 4\]"):
        run(X, jnp.ones((5, 3)), OPEN, OPEN)
