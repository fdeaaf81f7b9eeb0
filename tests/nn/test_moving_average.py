import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import nn

WIDTH = 8
MEGALODON = dict(num_heads=2, z_dim=4, value_dim=4, ema_dim=2, chunk_size=3, num_groups=2)
X = jax.random.normal(jax.random.key(1), (2, 12, WIDTH))


def make(kind, **arguments):
    return kind(WIDTH, rngs=nnx.Rngs(0), **arguments)


def call(module, x, **keywords):
    return nnx.jit(lambda module, x, keywords: module(x, **keywords))(module, x, keywords)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (nn.MegaLayer, dict(z_dim=4, ema_dim=2, chunk_size=3, attention="relu2")),
        (nn.MegalodonLayer, MEGALODON),
    ],
    ids=["mega", "megalodon"],
)
def test_calls_may_end_anywhere_in_a_chunk(kind, arguments):
    """Two tokens, then five from within a chunk to the next but one, then one, then four."""
    module = make(kind, **arguments)
    cache, parts = module.init_cache(2, 12), []
    for first, last in (0, 2), (2, 7), (7, 8), (8, 12):
        part, cache = call(module, X[:, first:last], cache=cache)
        parts.append(part)
    close(jnp.concatenate(parts, 1), call(module, X))
    assert cache["k"].shape[1] == 3  # however long the sequence


def test_averages_carry_what_chunks_do_not_see():
    mixer = make(nn.MegalodonAttention, **MEGALODON)
    slopes = nnx.jit(lambda mixer, x: jax.grad(lambda x: mixer(x)[0, 5].sum())(x))(mixer, X)
    assert (jnp.abs(slopes[0, :6]).max(-1) > 0).all() and (slopes[0, 6:] == 0).all()
    mixer.read[...] = 0 * mixer.read[...]
    mixer.omega[...] = 0 * mixer.omega[...]
    close(call(mixer, X), jnp.broadcast_to(call(mixer, X)[:1, :1], X.shape))


def test_the_ffn_is_added_to_the_input_of_the_layer():
    layer = make(nn.MegalodonLayer, **MEGALODON)
    y = layer.norm(X + call(layer.attention, X))
    ffn = layer.down(jax.nn.silu(layer.gate(y)) * layer.up(y))
    close(call(layer, X), X + ffn)
    layer.down.kernel[...] = 0 * layer.down.kernel[...]
    assert (call(layer, X) == X).all()


def test_without_causality_mega_sees_both_ways():
    layer = make(nn.MegaLayer, z_dim=4, ema_dim=2, causal=False, norm="rmsnorm")
    slopes = nnx.jit(lambda layer, x: jax.grad(lambda x: layer(x)[0, 5].sum())(x))(layer, X)
    assert (jnp.abs(slopes[0]).max(-1) > 0).all()
    with pytest.raises(ValueError, match="cache needs causal=True"):
        layer.init_cache(2, 12)


def test_averages_start_as_published():
    layer = make(nn.MegaLayer, z_dim=4)
    signs = jnp.sign(layer.average.beta[...])
    assert (signs[:, ::2] == 1).all() and (signs[:, 1::2] == -1).all()
    mixer = make(nn.MegalodonAttention, **MEGALODON)
    angles = jnp.sort(jax.nn.sigmoid(mixer.theta[...]))
    np.testing.assert_allclose(angles, jnp.sort(8.0 ** (-jnp.arange(1, 9) / 8)), rtol=1e-5)
    assert (mixer.read[..., 1] == 0).all() and jnp.abs(mixer.omega[...]).max() <= 1


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (nn.MegaLayer, {"attention": "relu"}, "attention must be one of"),
        (nn.MegaLayer, {"rel_pos": "alibi"}, "rel_pos must be one of"),
        (nn.MegaLayer, {"norm": "batchnorm"}, "norm must be one of"),
        (nn.MegalodonAttention, {"chunk_size": 0}, "chunk_size must be positive"),
        (nn.MegalodonAttention, {"num_groups": 3}, "num_groups: 8"),
    ],
)
def test_errors_name_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)
