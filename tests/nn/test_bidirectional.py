"""Mixers that read whole sequences against their operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import EfficientAttention, GeneralizedLinearAttention, LINAAttention
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 12, 16))


def make(kind, **arguments):
    build = dict(kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0))
    return kind(16, **build | arguments)


def in_heads(x):
    return split_heads(x, 4)


def agree(both, module):
    """`both` gives what a call is and what it is to be; compiled as one."""
    np.testing.assert_allclose(*nnx.jit(both)(module, X), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mid_dim", [24, -1])
def test_generalized_queries_start_plain(mid_dim):
    mixer = make(GeneralizedLinearAttention, causal=False, mid_dim=mid_dim)
    doubled = 2 if mid_dim == -1 else 1

    def both(mixer, x):
        parts = doubled * mixer.query(x), doubled * mixer.key(x), mixer.value(x)
        y = ops.linear_attention(*(in_heads(part) for part in parts), eps=12e-4)
        return mixer(x), mixer.out(y.reshape(x.shape))

    agree(both, mixer)
    twice = lambda mixer, x: (mixer(jnp.concatenate([x, x], 1))[:, :12], mixer(x))  # noqa: E731
    agree(twice, mixer)


def test_the_detour_moves_queries_and_keys():
    mixer = make(GeneralizedLinearAttention, causal=False)
    mixer.query_map.layers[-1].kernel[...] = jnp.eye(16)

    def both(mixer, x):
        hidden = mixer.query_map.layers[1](mixer.query_map.layers[0](x))
        q = mixer.query(x + jnp.where(hidden > 0, hidden, 0.01 * hidden))
        y = ops.linear_attention(*map(in_heads, (q, mixer.key(x), mixer.value(x))), eps=12e-4)
        return mixer(x), mixer.out(y.reshape(x.shape))

    agree(both, mixer)


@pytest.mark.parametrize("kind", [EfficientAttention, GeneralizedLinearAttention, LINAAttention])
def test_whole_rows_are_not_causal(kind):
    with pytest.raises(ValueError, match="causal must be False"):
        make(kind)
    mixer = make(kind, causal=False)
    with pytest.raises(ValueError, match="segment_ids need"):
        mixer(X, segment_ids=jnp.zeros((2, 12), int))
    with pytest.raises(ValueError, match="cache needs causal=True"):
        mixer(X, cache={})


def test_heads_divide_the_channels():
    with pytest.raises(ValueError, match="num_heads=4 must divide the key channels 6"):
        make(EfficientAttention, key_channels=6, causal=False)
