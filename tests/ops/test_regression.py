import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def qkv(length=7, keys=9, heads=4, kv_heads=2, dim=3, v_dim=2):
    shapes = (2, length, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, v_dim)
    return tuple(normal(n, *shape) for n, shape in enumerate(shapes))


attend = jax.jit(
    ops.local_linear_attention, static_argnames=("causal", "solver", "cg_iters", "scale")
)


def test_it_is_the_intercept_of_the_weighted_ridge_regression(x64):
    q, k, v = qkv(heads=2)
    _, weights = ops.dot_product_attention(q, k, v, return_weights=True)
    q, k, v, weights = map(np.asarray, (q, k, v, weights))
    want = np.zeros((*q.shape[:3], 2))
    for b, t, h in np.ndindex(want.shape[:3]):
        z = np.concatenate([np.ones((9, 1)), k[b, :, h] - q[b, t, h]], 1)
        normal_matrix = z.T @ (weights[b, h, t][:, None] * z) + 0.3 * np.diag([0, 1, 1, 1])
        right = z.T @ (weights[b, h, t][:, None] * v[b, :, h])
        want[b, t, h] = np.linalg.solve(normal_matrix, right)[0]
    close(attend(q, k, v, 0.3, causal=False), want)


@pytest.mark.parametrize("solver", ["direct", "cg"])
def test_affine_values_are_continued_and_a_large_ridge_is_softmax(solver, x64):
    q, k, v = qkv()
    slope, start = normal(3, 3, 2), normal(4, 2)
    affine = attend(q, k, start + k @ slope, 1e-12, causal=False, solver=solver)
    close(affine, start + q @ slope, 1e-6)
    close(
        attend(q, k, jnp.broadcast_to(start, v.shape), 0.1, solver=solver),
        jnp.broadcast_to(start, affine.shape),
    )
    close(attend(q, k, v, 1e12, solver=solver), ops.dot_product_attention(q, k, v, causal=True))
    first = attend(q[:, :1], k[:, :1], v[:, :1], 0.5, solver=solver)
    close(first, jnp.repeat(v[:, :1], 2, 2))


def test_both_solvers_have_the_same_gradients(x64):
    arrays = *qkv(length=5, keys=6, heads=2), 0.2 + jnp.square(normal(3, 2, 2, 5))

    def slopes(solver):
        def loss(arrays):
            return jnp.sum(jnp.sin(ops.local_linear_attention(*arrays, solver=solver)))

        return jax.jit(jax.grad(loss))(arrays)

    jax.tree.map(lambda a, b: close(a, b, 1e-7), slopes("cg"), slopes("direct"))


def test_conjugate_gradients_hold_no_matrix_of_keys():
    q = k = v = jnp.zeros((1, 64, 1, 48))
    run = jax.jit(lambda *x: ops.local_linear_attention(*x, 0.1, solver="cg", cg_iters=2))
    held = run.lower(q, k, v).compile().memory_analysis().temp_size_in_bytes
    assert held < 4 * 64 * 48 * 48


def test_steps_are_counted_and_errors_name_the_argument():
    q, k, v = qkv()
    none = attend(q, k, v, 0.1, solver="cg", cg_iters=0)
    close(none, ops.dot_product_attention(q, k, v, causal=True), 1e-6)
    with pytest.raises(ValueError, match="solver must be"):
        ops.local_linear_attention(q, k, v, 0.1, solver="lu")
