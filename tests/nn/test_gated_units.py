import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import GatedAttentionUnit, MossFormerBlock

call = nnx.jit(lambda mixer, *inputs, **keywords: mixer(*inputs, **keywords))
X = jax.random.normal(jax.random.key(0), (2, 11, 4))


def make(kind, **settings):
    settings = dict(qk_dim=6, scale_std=1.0, rngs=nnx.Rngs(0)) | settings
    return kind(4, **settings)


def test_one_chunk_of_everything_is_attention_to_all_keys():
    """Divided by the size of the chunk or by the training length."""
    whole = make(GatedAttentionUnit, group_size=None, context=16)
    chunk = make(GatedAttentionUnit, group_size=16)
    nnx.update(chunk, nnx.state(whole, nnx.Not(nnx.PathContains("copies"))))
    for name in "scales", "shifts":
        q, k = getattr(whole.copies, name)[...]
        getattr(chunk.copies, name)[...] = jnp.stack([q, q, k, k])
    np.testing.assert_allclose(call(chunk, X), call(whole, X), rtol=1e-4, atol=1e-6)


def test_a_unit_that_looks_both_ways_divides_by_its_length():
    unit = make(GatedAttentionUnit, group_size=None, causal=False)
    u, v = jnp.split(jax.nn.silu(unit.uv(X)), 2, -1)
    q, k = unit.copies(jax.nn.silu(unit.z(X)), jnp.arange(11))
    weights = jax.nn.relu(q @ jnp.swapaxes(k, 1, 2) / 11) ** 2
    np.testing.assert_allclose(call(unit, X), unit.out(u * (weights @ v)), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="cache needs causal=True"):
        unit(X, cache=unit.init_cache(2, 11))


def test_decoding_does_not_change_the_cache_it_is_given():
    unit = make(GatedAttentionUnit, group_size=4)
    cache = unit.init_cache(2, 11)
    assert sorted(cache) == ["chunk", "index", "key", "state", "value"]
    jax.eval_shape(lambda: unit(X[:, :3], cache=cache))
    assert sorted(cache) == ["chunk", "index", "key", "state", "value"]
    assert unit.state_bytes(11) == unit.state_bytes(1000)


def test_the_block_joins_two_attentions():
    block = make(MossFormerBlock, group_size=4, conv_size=3)

    @nnx.jit
    def wanted(block):
        late = jnp.pad(X[..., :2], ((0, 0), (1, 0), (0, 0)))[:, :-1]
        h = jnp.concatenate([late, X[..., 2:]], -1)
        v, u = jnp.split(block.vu(h), 2, -1)
        q, q_lin, k, k_lin = block.copies(block.z(h), jnp.arange(11))
        mixed = [ops.mixed_chunk_attention(q, k, q_lin, k_lin, x, group_size=4) for x in (u, v)]
        return X + block.out(ops.attentive_gate(*mixed, u, v))

    np.testing.assert_allclose(call(block, X), wanted(block), rtol=1e-4, atol=1e-5)


def test_convolutions_of_the_block_reach_equally_far_both_ways():
    layer = make(MossFormerBlock, group_size=4, conv_size=5).vu
    slopes = jax.jit(jax.grad(lambda x: layer(x)[0, 5].sum()))(X)[0]
    np.testing.assert_array_equal(slopes.any(-1), jnp.abs(jnp.arange(11) - 5) <= 2)


@pytest.mark.parametrize("causal", [False, True])
def test_what_a_token_of_the_block_sees(causal):
    block = make(MossFormerBlock, group_size=4, conv_size=3, causal=causal)
    slopes = jax.jit(jax.grad(lambda x: block(x)[0, 5].sum()))(X)[0]
    np.testing.assert_array_equal(slopes.any(-1), (jnp.arange(11) <= 5) | (not causal))


def test_dropout_of_the_block_acts_only_with_keys():
    block = make(MossFormerBlock, group_size=4, conv_size=3, dropout=0.5)
    plain, dropped = call(block, X), call(block, X, rngs=nnx.Rngs(dropout=1))
    np.testing.assert_array_equal(call(block, X), plain)
    assert not np.allclose(dropped, plain)


def test_errors():
    with pytest.raises(ValueError, match="group_size must be positive, got -1"):
        make(GatedAttentionUnit, group_size=-1)
    with pytest.raises(ValueError, match="conv_size must be odd"):
        make(MossFormerBlock, conv_size=4)
