import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.analysis import as_ltv, dsf_transfer_matrix, ltv_distance, ltv_unroll


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def qkv():
    return normal(0, 2, 7, 4, 3), normal(1, 2, 7, 2, 3), normal(2, 2, 7, 4, 5)


unroll = jax.jit(ltv_unroll)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("stem", ["ltv_unroll", "dsf_transfer_matrix"])
def test_golden(stem, wide):
    with jax.enable_x64(wide), jax.default_matmul_precision("highest"):
        golden.check(stem, wide)


def test_systems_unroll_to_their_operators(x64):
    q, k, v = qkv()
    log_decay = jax.nn.log_sigmoid(normal(3, 2, 7, 4, 3))
    rates, steps = -jnp.exp(normal(4, 4)), jax.nn.softplus(normal(5, 2, 7, 4))
    skip, eps = normal(6, 4), 1e-3
    state_space = dict(dt=steps, a=rates, b=k, c=q[:, :, ::2])
    for name, arrays, want in (
        ("linear", dict(q=q, k=k, eps=eps), ops.linear_attention(q, k, v, causal=True, eps=eps)),
        (
            "gla",
            dict(q=q, k=k, log_decay=log_decay),
            ops.gated_linear_attention(q, k, v, log_decay),
        ),
        (
            "gla",
            dict(q=q, k=k, log_decay=log_decay[..., 0], scale=0.3),
            ops.gated_linear_attention(q, k, v, log_decay[..., 0], scale=0.3),
        ),
        ("retention", dict(q=q, k=k), ops.retention(q, k, v)),
        ("ssd", dict(**state_space, d=skip), ops.ssd(v, **state_space, d=skip)),
    ):
        phi = unroll(*as_ltv(name, **arrays))
        close(jnp.einsum("bhts,bshd->bthd", phi, v), want)
        assert (jnp.triu(phi, 1) == 0).all()


def test_normalising_the_recurrence_is_normalising_the_output(x64):
    """The products of eta_{t-1} / eta_t telescope."""
    q, k, _ = qkv()
    maps = [unroll(*as_ltv(name, q=q, k=k)) for name in ("linear", "softmax_norm")]
    close(*maps)
    close(ltv_distance(*maps), jnp.zeros((2, 4)))
    other = unroll(*as_ltv("softmax_norm", q=q, k=k, eta=jnp.ones((2, 7, 4))))
    assert (ltv_distance(maps[0], other) > 0.1).all()


def test_zero_negative_and_complex_transitions(x64):
    a, b, c, d = (
        normal(0, 1, 5, 1, 3),
        normal(1, 1, 5, 1, 3),
        normal(2, 1, 5, 1, 3),
        normal(3, 1, 5, 1),
    )
    a = a.at[0, 2, 0, 0].set(0)
    phi = jnp.stack([dsf_transfer_matrix(*(x[0, :, 0] for x in (a, b, c)))])[None]
    want = np.zeros((5, 5))
    for t, s in np.ndindex(5, 5):
        if s <= t:
            want[t, s] = jnp.sum(c[0, t, 0] * jnp.prod(a[0, s + 1 : t + 1, 0], 0) * b[0, s, 0])
    close(phi[0, 0], want)
    close(unroll(a, b, c, d)[0, 0], want + np.diag(d[0, :, 0]))
    slope = jax.grad(lambda a: ltv_unroll(a, b, c)[0, 0, 2, 1])(a)
    close(slope[0, 2, 0], c[0, 2, 0] * b[0, 1, 0])
    turning = unroll(jnp.full_like(a, 1j, complex), b, c)
    close(turning[0, 0, 2, 0], -jnp.sum(c[0, 2, 0] * b[0, 0, 0]))
    close(unroll(jnp.ones_like(a), b, c)[0, 0], jnp.tril(c[0, :, 0] @ b[0, :, 0].T))


def test_distances():
    m = normal(0, 2, 3, 4, 4)
    close(ltv_distance(m, m), jnp.zeros((2, 3)))
    close(ltv_distance(m, -m), jnp.full((2, 3), 2.0), 1e-5)
    close(ltv_distance(m, 0 * m), jnp.ones((2, 3)), 1e-5)
    close(ltv_distance(0 * m, 0 * m), jnp.zeros((2, 3)))


def test_errors_name_the_argument():
    a = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match="name must be one of linear, gla"):
        as_ltv("rwkv", q=a, k=a)
    with pytest.raises(ValueError, match=r"c must be \[B, T, H, N\]"):
        ltv_unroll(a, a, a[:, 1:])
    with pytest.raises(ValueError, match=r"d must be \[B, T, H\]"):
        ltv_unroll(a, a, a, a)
