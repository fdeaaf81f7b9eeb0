"""DyDiLA against its operator, and what it routes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import DyDiLA
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 12, 16))


def make(**arguments):
    init = nnx.initializers.normal(0.5)
    return DyDiLA(16, causal=False, kernel_init=init, rngs=nnx.Rngs(0), **arguments)


def run(mixer, x=X, **options):
    return nnx.jit(lambda mixer, x: mixer(x, **options))(mixer, x)


def heads(mixer, x=X):
    return [split_heads(part, 4) for part in jnp.split(mixer.qkv(x), 3, -1)]


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_dydila_without_difference_sharpens_queries_and_keys():
    mixer = make(grid=(3, 4), conv_size=3)
    mixer.conv.kernel[...] = jnp.zeros_like(mixer.conv.kernel[...])
    for route in mixer.query, mixer.key:
        route.values[2][...] = jnp.zeros(9)
    q, k, v = heads(mixer)
    cubes = (ops.norm_preserving_power(x, jnp.full(x.shape[:3], 3.0)) for x in (q, k))
    want = ops.linear_attention(*cubes, v, feature_map="identity", normalization="none")
    close(run(mixer), mixer.out(want.reshape(X.shape)))


def test_dydila_routes_tokens_and_learns_the_routes():
    mixer = make()
    route = mixer.query
    own = mixer.qkv(X)[..., :16]
    for values, low in zip(route.values, (2.0, 1.0, 0.1)):
        values[...] = low + jnp.arange(9.0) / 10
    redundant, gamma, gamma_redundant, lam = route(X, own)
    bank = route.bank(X).reshape(2, 12, 3, 16)
    picks = route.bank_router(X).argmax(-1)
    close(redundant, jnp.take_along_axis(bank, picks[..., None, None], 2)[:, :, 0])
    assert len(set(picks.ravel().tolist())) == 3
    both = jnp.concatenate([own, redundant], -1)
    for got, router, values, seen in zip(
        (gamma, gamma_redundant, lam), route.routers, route.values, (own, redundant, both)
    ):
        assert got.shape == (2, 12, 4)
        close(got, values[...][router(seen).reshape(2, 12, 4, 9).argmax(-1)])
    slopes = nnx.jit(nnx.grad(lambda mixer: jnp.sum(jnp.sin(mixer(X)))))(mixer)
    for path, slope in nnx.to_flat_state(slopes):
        moved = path[0] == "key" or (slope[...] != 0).any()  # those of keys are all alike yet
        assert jnp.isfinite(slope[...]).all() and moved, path


def test_dydila_needs_a_grid_to_convolve():
    with pytest.raises(ValueError, match="grid must be given"):
        make(conv_size=3)
