import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

X = 5 * jax.random.normal(jax.random.key(0), (2, 6, 3, 4))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_exponentials_and_decays_are_in_units_of_the_largest_so_far(shared):
    peaks = jax.lax.cummax(X.max(-1, keepdims=True) if shared else X, axis=1)
    exponentials, log_decay, last = ops.running_exp(X, shared=shared)
    close(exponentials, jnp.exp(X - peaks))
    close(log_decay[:, 1:], peaks[:, :-1] - peaks[:, 1:])
    close(last, peaks[:, -1:])
    assert (exponentials <= 1).all() and (log_decay[:, 0] < -1e20).all()
    head = ops.running_exp(X[:, :2], shared=shared)
    tail = ops.running_exp(X[:, 2:], shared=shared, peak=head[2])
    close(jnp.concatenate([head[0], tail[0]], 1), exponentials)
    close(tail[1], log_decay[:, 2:])


def test_segments_forget_and_masked_positions_count_nothing():
    ids = jnp.array([[3, 3, -1, 3, 1, 1]] * 2)
    mask = jnp.array([[1, 1, 1, 1, 1, 0]] * 2, bool)
    exponentials, log_decay, last = ops.running_exp(X, segment_ids=ids, mask=mask)
    assert (exponentials[:, 2] == 0).all() and (exponentials[:, 5] == 0).all()
    assert (log_decay[:, 2] == 0).all() and (log_decay[:, 4] == -jnp.inf).all()
    close(last, X[:, 4:5])
    kept = jnp.array([0, 1, 3])
    close(exponentials[:, kept], ops.running_exp(X[:, kept])[0])
    slope = jax.grad(lambda x: ops.running_exp(x, segment_ids=ids, mask=mask)[0].sum())(X)
    assert jnp.isfinite(slope).all() and (slope[:, 2] == 0).all()
