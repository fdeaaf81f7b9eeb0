"""Latte and Linformer, against their operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import Latte, Linformer
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 12, 16))


def make(kind, **arguments):
    build = dict(kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0))
    return kind(16, **build | arguments)


def run(mixer, x=X):
    return nnx.jit(lambda mixer, x: mixer(x))(mixer, x)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_latte_divides_its_latents_among_the_heads(causal):
    mixer = make(Latte, num_latents=8, causal=causal)
    parts = jnp.split(mixer.qkv(X), (8, 16), -1)
    want = ops.latte_attention(*(split_heads(part, 4) for part in parts), causal=causal)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    assert mixer.packs == causal
    if causal:
        assert mixer.state_bytes(1000) == 4 * 8 * (4 + 2)
        return
    with pytest.raises(ValueError, match="cache needs causal=True"):
        mixer(X, cache=mixer.init_cache(2, 12))
    with pytest.raises(ValueError, match="segment_ids need causal=True"):
        mixer(X, segment_ids=jnp.zeros((2, 12), int))


def test_latents_are_divided_evenly():
    with pytest.raises(ValueError, match="must divide the number of latents 6"):
        make(Latte, num_latents=6)


@pytest.mark.parametrize("sharing", ["headwise", "kv"])
def test_linformer_projects_keys_and_values(sharing):
    mixer = make(Linformer, max_len=14, proj_len=5, sharing=sharing, causal=False)
    keys = values = mixer.projection[...]
    if sharing == "headwise":
        values = mixer.value_projection[...]
        assert not jnp.allclose(keys, values)
    q, k, v = (split_heads(part, 4) for part in jnp.split(mixer.qkv(X), 3, -1))
    want = ops.linformer_attention(q, k, v, keys, values)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    with pytest.raises(ValueError, match="proj_k must be"):
        mixer(jnp.zeros((1, 15, 16)))


def test_layers_of_linformer_share_one_projection():
    class Model(nnx.Module):
        def __init__(self):
            self.first = make(Linformer, sharing="layer", causal=False, max_len=12, proj_len=5)
            shared = dict(sharing="layer", projection=self.first.projection)
            self.second = make(Linformer, causal=False, max_len=12, proj_len=5, **shared)

    model = Model()
    assert sum(x.shape == (5, 12) for x in jax.tree.leaves(nnx.state(model))) == 1
    slopes = nnx.jit(nnx.grad(lambda m: (m.second(m.first(X)) ** 2).sum()))(model)
    alone = nnx.jit(nnx.grad(lambda m, x: (m(x) ** 2).sum()))(model.second, model.first(X))
    slope = slopes["first"]["projection"][...]
    assert not jnp.allclose(slope, alone["projection"][...], rtol=1e-2)


def test_linformer_says_what_does_not_fit():
    for arguments, message in (
        ({"sharing": "all"}, "sharing must be"),
        ({"projection": nnx.Param(jnp.zeros((256, 64)))}, "needs sharing='layer'"),
        ({"causal": True}, "causal must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            make(Linformer, **{"causal": False} | arguments)
