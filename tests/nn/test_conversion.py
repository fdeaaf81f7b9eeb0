import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import nn

WIDTH = 16
X = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))


def make(kind=nn.MultiHeadAttention, **arguments):
    settings = dict(rope_theta=100.0, qk_norm="rms", bias=True, out_bias=True)
    return kind(WIDTH, rngs=nnx.Rngs(0), **settings | arguments)


run = nnx.jit(lambda mixer, x, **keywords: mixer(x, **keywords))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def with_equal_heads(mixer, groups):
    """The mixer with key and value heads that are equal within blocks, and biases that count."""
    for layer in (mixer.key, mixer.value):
        layer.bias[...] = jax.random.normal(jax.random.key(1), layer.bias.shape)
        for name in ("kernel", "bias"):
            param = getattr(layer, name)
            heads = param[...].reshape(-1, 4, 4)[:, :: 4 // groups]
            param[...] = jnp.repeat(heads, 4 // groups, 1).reshape(param.shape)
    return mixer


def test_equal_heads_are_grouped_exactly():
    mixer = with_equal_heads(make(), 2)
    grouped = nn.group_heads(mixer, 2)
    assert grouped.state_bytes(8) == mixer.state_bytes(8) // 2
    close(run(grouped, X), run(mixer, X))
    cache = grouped.init_cache(2, 6)
    close(run(grouped, X, cache=cache)[0], run(mixer, X))
    picked = nn.group_heads(make(), 2, key_weight=jnp.array([1.0, 0, 0, 1]))
    want = make().key.kernel[...].reshape(WIDTH, 4, 4)[:, jnp.array([0, 3])]
    close(picked.key.kernel[...].reshape(WIDTH, 2, 4), want)


def test_decoupled_heads_start_as_the_heads_they_come_from():
    mixer, one = make(), jnp.eye(4)
    same = nn.decouple_heads(mixer, one, one, range(4), range(4))
    close(run(same, X), run(mixer, X))
    mixer = with_equal_heads(make(), 2)
    order = (1, 1, 0, 0)
    fused = nn.decouple_heads(mixer, one[jnp.array([3, 0])], one, order, range(4))
    close(run(fused, X), run(mixer, X))
    assert fused.state_bytes(8) == 4 * 8 * (2 + 4) * 4


def test_what_cannot_be_converted():
    with pytest.raises(ValueError, match="must be a MultiHeadAttention itself, got SinkAttention"):
        nn.group_heads(make(nn.SinkAttention), 2)
    with pytest.raises(ValueError, match="num_kv_heads=3 must divide the 4"):
        nn.group_heads(make(), 3)
    sigmoid = nn.MultiHeadAttention(WIDTH, attention=lambda q, k, v, mask: v, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have attention="):
        nn.decouple_heads(sigmoid, jnp.eye(4), jnp.eye(4), range(4), range(4))
