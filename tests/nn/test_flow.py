import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import FlowAttention
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 9, 16))


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_operator(causal):
    mixer = FlowAttention(16, causal=causal, rngs=nnx.Rngs(0))
    q, k, v = (split_heads(part, 4) for part in jnp.split(mixer.qkv(X), 3, -1))
    want = mixer.out(ops.flow_attention(q, k, v, causal=causal).reshape(X.shape))
    np.testing.assert_allclose(mixer(X), want, rtol=1e-5, atol=1e-6)


def test_decoding_keeps_four_vectors_a_matrix_and_two_numbers():
    mixer = FlowAttention(16, rngs=nnx.Rngs(0))
    assert mixer.state_bytes(1000) == 4 * (4 * (4 * 4 + 4 * 4 + 1) + 1)


def test_padding_is_passed_over():
    mixer = FlowAttention(16, rngs=nnx.Rngs(0))
    ids = jnp.array([[-1] * 2 + [0] * 4 + [1] * 3] * 2)
    call = lambda x: jnp.sin(mixer(x, segment_ids=ids)[:, 2:6])  # noqa: E731
    y, slopes = nnx.jit(lambda x: (call(x), jax.grad(lambda x: call(x).sum())(x)))(X)
    np.testing.assert_allclose(y, jnp.sin(mixer(X[:, 2:6])), rtol=1e-4, atol=1e-6)
    assert jnp.isfinite(slopes).all() and not slopes[:, :2].any() and slopes[:, 2:6].all()


def test_whole_rows_have_neither_segments_nor_a_cache():
    mixer = FlowAttention(16, causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="segment_ids need causal=True"):
        mixer(X, segment_ids=jnp.zeros((2, 9), int))
    with pytest.raises(ValueError, match="cache needs causal=True"):
        mixer(X, cache=mixer.init_cache(2, 9))
