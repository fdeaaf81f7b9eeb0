import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import attentive_gate, linear_attention, mixed_chunk_attention


def arrays(length=11):
    keys = jax.random.split(jax.random.key(length), 5)
    sizes = 4, 4, 4, 4, 3
    return [jax.random.normal(key, (2, length, n)) for key, n in zip(keys, sizes)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 3), (11, 4), (12, 4), (5, 16)])
def test_it_is_the_sum_over_chunks(x64, causal, length, size):
    q, k, q_lin, k_lin, v = arrays(length)
    got = mixed_chunk_attention(q, k, q_lin, k_lin, v, group_size=size, causal=causal)
    t, s = jnp.arange(length)[:, None], jnp.arange(length)
    near = (t // size == s // size) & ((t >= s) | (not causal))
    far = (s // size < t // size) if causal else (s >= 0)
    local = jnp.where(near, jax.nn.relu(jnp.einsum("btd,bsd->bts", q, k) / size) ** 2, 0)
    wide = jnp.where(far, jnp.einsum("btd,bsd->bts", q_lin, k_lin), 0)
    want = (local + wide / (size if causal else length)) @ v
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_without_the_local_part_it_is_linear_attention(x64):
    q, k, q_lin, k_lin, v = arrays()
    got = mixed_chunk_attention(0 * q, k, q_lin, k_lin, v, group_size=4)
    heads = (x[:, :, None] for x in (q_lin, k_lin, v))
    want = linear_attention(*heads, feature_map="identity", normalization="none", scale=1 / 11)
    np.testing.assert_allclose(got, want[:, :, 0], atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_tokens_are_not_seen(causal):
    *others, v = arrays()
    mask = jnp.ones((2, 11), bool).at[:, jnp.array([1, 6])].set(False)
    run = jax.jit(
        lambda v, mask: mixed_chunk_attention(*others, v, group_size=4, causal=causal, mask=mask)
    )
    got = run(v, mask)
    np.testing.assert_array_equal(got, run(jnp.where(mask[..., None], v, 1e3), mask))
    assert not np.allclose(got, run(v, jnp.ones_like(mask)))


def test_roles_of_the_gate_are_not_interchangeable():
    a, b, u, v = jax.random.normal(jax.random.key(0), (4, 2, 3))
    np.testing.assert_allclose(attentive_gate(a, b, u, v), a * v * jax.nn.sigmoid(b * u))
    assert not np.allclose(attentive_gate(a, b, u, v), attentive_gate(b, a, v, u))


def test_errors():
    q, k, q_lin, k_lin, v = arrays()
    with pytest.raises(ValueError, match="group_size must be positive"):
        mixed_chunk_attention(q, k, q_lin, k_lin, v, group_size=0)
    with pytest.raises(ValueError, match=r"mask must be \[B, T\]"):
        mixed_chunk_attention(q, k, q_lin, k_lin, v, group_size=2, mask=jnp.ones(11, bool))
    with pytest.raises(ValueError, match="queries and keys must be"):
        mixed_chunk_attention(q, k[:, :3], q_lin, k_lin, v, group_size=2)
