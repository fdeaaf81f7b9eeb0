import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def qkv(length=7, heads=2, dim=4, v_dim=3):
    return tuple(normal(n, 2, length, heads, d) for n, d in enumerate((dim, dim, v_dim)))


def test_the_norm_has_mean_square_one_and_keeps_zeros(x64):
    x = normal(0, 2, 3, 5).at[0, 0].set(0)
    out = ops.simple_rms_norm(x, eps=0)
    close(jnp.square(out).mean(-1), jnp.ones((2, 3)).at[0, 0].set(0))
    slope = jax.grad(lambda x: ops.simple_rms_norm(x, eps=0).sum())(x)
    assert jnp.isfinite(slope).all()
    half = ops.simple_rms_norm(jnp.full((2, 64), 300.0, jnp.float16))
    assert half.dtype == jnp.float16 and (half == 1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_norm_attention_ignores_the_size_of_values_and_queries(causal, x64):
    q, k, v = qkv()
    part = dict(causal=causal, eps=0, feature_map="relu")
    out = ops.norm_linear_attention(q, k, v, **part)
    close(jnp.square(out).mean((2, 3)), jnp.ones((2, 7)))
    sizes = jnp.exp(normal(4, 2, 7, 1, 1))
    close(ops.norm_linear_attention(sizes * q, k, 3 * v, **part), out)
    raw = ops.linear_attention(q, k, v, feature_map="relu", normalization="none", causal=causal)
    close(out * jnp.sqrt(jnp.square(raw).mean((2, 3), keepdims=True)), raw)


def test_blocks_attend_by_themselves(x64):
    q, k, v = qkv()
    close(ops.block_diagonal_attention(q, k, v, block_size=1), v)
    whole = ops.dot_product_attention(q, k, v, causal=True)
    close(ops.block_diagonal_attention(q, k, v, block_size=7, causal=True), whole)
    parts = [
        ops.dot_product_attention(*(x[:, part] for x in (q, k, v)))
        for part in (slice(0, 3), slice(3, 6), slice(6, 7))
    ]
    close(ops.block_diagonal_attention(q, k, v, block_size=3), jnp.concatenate(parts, 1))
    mask = jnp.ones((7, 7), bool).at[6].set(False)
    assert (ops.block_diagonal_attention(q, k, v, block_size=3, mask=mask)[:, 6] == 0).all()
    with pytest.raises(ValueError, match="block_size must be"):
        ops.block_diagonal_attention(q, k, v, block_size=0)
    with pytest.raises(ValueError, match="must have the length of q"):
        ops.block_diagonal_attention(q[:, 1:], k, v, block_size=2)


def test_lrpe_products_depend_on_distance(x64):
    x, y, theta = normal(0, 1, 6, 2, 4), normal(1, 1, 6, 2, 4), normal(2, 2, 4)
    got = jnp.einsum("bthd,bshd->hts", ops.lrpe(x, theta), ops.lrpe(y, theta))
    turn = jnp.cos(theta * (jnp.arange(6)[:, None] - jnp.arange(6))[..., None, None])
    close(got, jnp.einsum("bthd,bshd,tshd->hts", x, y, turn))
    late = ops.lrpe(x[:, 2:], theta, offset=2)
    close(late, ops.lrpe(x, theta)[:, 2:])
    close(ops.lrpe(x, 0 * theta), jnp.concatenate([x, 0 * x], -1))
    with pytest.raises(ValueError, match="theta must be"):
        ops.lrpe(x, theta[:, :3])
