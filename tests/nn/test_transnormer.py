"""TransNormer's layers against their operators."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import DiagAttention, NormAttention, SimpleGLU, TransNormerMixer
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 11, 16))
BUILD = dict(kernel_init=nnx.initializers.normal(0.5))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


call = nnx.jit(lambda mixer, x, **arguments: mixer(x, **arguments))


def heads(mixer, x):
    return (split_heads(part, mixer.num_heads) for part in jnp.split(mixer.qkv(x), 3, -1))


def test_norm_attention_is_the_operator_with_a_gate():
    mixer = NormAttention(16, feature_map="relu", **BUILD, rngs=nnx.Rngs(0))

    @nnx.jit
    def both(mixer, x):
        y = ops.norm_linear_attention(*heads(mixer, x), feature_map="relu", causal=True)
        return mixer(x), mixer.out(y.reshape(x.shape) * jax.nn.silu(mixer.output_gate(x)))

    close(*both(mixer, X))


@pytest.mark.parametrize("depth", [0, 1])
def test_lightning_attention_is_the_operator_with_positions_in_the_first_layer(depth):
    mixer = TransNormerMixer(16, depth=depth, num_layers=3, **BUILD, rngs=nnx.Rngs(0))
    theta = 10000 ** (-2 * jnp.arange(16.0) / 16).reshape(4, 4)
    if depth == 0:
        close(mixer.theta[...], theta)

    @nnx.jit
    def both(mixer, x):
        q, k, v = heads(mixer, x)
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        if depth == 0:
            q, k = ops.lrpe(q, theta), ops.lrpe(k, theta)
        y = ops.lightning_attention(q, k, v, ops.lightning_slopes(4, depth, 3))
        y = ops.simple_rms_norm(y.reshape(x.shape))
        return mixer(x), mixer.out(y * mixer.output_gate(x))

    close(*both(mixer, X))


def test_a_layer_that_is_not_of_the_model_is_refused():
    with pytest.raises(ValueError, match="layer_idx must be within 0 and 2, got 3"):
        TransNormerMixer(16, depth=3, num_layers=3, rngs=nnx.Rngs(0))


def test_a_plain_gated_unit_is_even():
    glu = SimpleGLU(16, hidden=24, rngs=nnx.Rngs(0))
    close(glu(-X), glu(X))
    close(glu(3 * X), 9 * glu(X))


def diag(**arguments):
    return DiagAttention(16, **arguments, **BUILD, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_do_not_see_each_other(causal):
    mixer = diag(block_size=4, causal=causal)
    parts = [call(mixer, X[:, start : start + 4]) for start in (0, 4, 8)]
    y = call(mixer, X)
    close(y, jnp.concatenate(parts, 1))
    whole = call(diag(block_size=11, causal=causal), X)
    assert not np.allclose(y[:, 4:], whole[:, 4:], atol=1e-3)


def test_a_block_of_one_token_is_its_value():
    mixer = diag(block_size=1)
    close(mixer(X), mixer.out(mixer.value(X)))


def test_documents_have_blocks_of_their_own():
    mixer = diag(block_size=4)
    ids = jnp.array([[3] * 5 + [7] * 6] * 2)
    parts = call(mixer, X[:, :5]), call(mixer, X[:, 5:])
    close(call(mixer, X, segment_ids=ids), jnp.concatenate(parts, 1))


@pytest.mark.parametrize("cuts", [(0, 2, 3, 9, 11), (0, 11)])
def test_the_cache_keeps_a_block(cuts):
    mixer = diag(block_size=4, window=3, num_kv_heads=2)
    cache, parts = mixer.init_cache(2, 11), []
    for start, end in itertools.pairwise(cuts):
        y, cache = call(mixer, X[:, start:end], cache=cache)
        parts.append(y)
    close(jnp.concatenate(parts, 1), call(mixer, X))
    assert mixer.state_bytes(1000) == 4 * 2 * 3 * 8


def test_weights_are_within_blocks():
    weights = diag(block_size=4).weights(X)
    block = jnp.arange(11) // 4
    assert not jnp.where(block[:, None] == block, 0, weights).any()
    close(weights.sum(-1), 1)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        diag(block_size=0)
