"""The causal mixer of refined gates against the operator, whose maximum looks ahead."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_lab import ops
from attn_lab.nn import ReGLA
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 19, 16))


def mixer(**arguments):
    return ReGLA(16, kernel_init=nnx.initializers.normal(0.5), **arguments, rngs=nnx.Rngs(0))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_it_is_the_normed_operator():
    layer = mixer(norm_eps=0.0)  # which takes the scale of the keys' maximum off
    q, k, v = (split_heads(part, 4) for part in jnp.split(layer.qkv(X), 3, -1))
    gate, refine = (split_heads(part, 4) for part in jnp.split(layer.gates(X), 2, -1))
    heads = ops.refined_gated_linear_attention(q, k, v, 1 + gate, refine)
    close(layer(X), layer.out(layer.norm(heads).reshape(X.shape)))


def test_a_key_beyond_the_range_of_exponentials_disturbs_no_token_before_it():
    layer = mixer()
    call = nnx.jit(lambda layer, x: (layer(x), jax.grad(lambda x: layer(x).sum())(x)))
    y, slopes = call(layer, X.at[:, 12].multiply(1e3))
    np.testing.assert_array_equal(y[:, :12], call(layer, X)[0][:, :12])
    assert jnp.isfinite(y).all() and jnp.isfinite(slopes).all()


def test_padding_between_and_before_the_parts_of_a_document_is_passed_over():
    layer = mixer()
    ids = jnp.array([[-1] * 2 + [0] * 6 + [-1] * 3 + [0] * 4 + [1] * 4] * 2)
    real = jnp.concatenate([X[:, 2:8], X[:, 11:15]], 1)
    loud = X.at[:, :2].multiply(100).at[:, 8:11].multiply(100)
    y, slopes = nnx.jit(
        lambda layer, x: (
            layer(x, segment_ids=ids),
            jax.grad(lambda x: layer(x, segment_ids=ids)[:, 2:8].sum())(x),
        )
    )(layer, loud)
    want = layer(real)
    close(jnp.concatenate([y[:, 2:8], y[:, 11:15]], 1), want)
    close(y[:, 15:], layer(X[:, 15:]))
    assert jnp.isfinite(slopes).all() and not slopes[:, :2].any() and not slopes[:, 8:].any()


def test_the_gates_start_open():
    layer = mixer()
    assert (layer.gate_bias[...] == 1).all() and not layer.refine_bias[...].any()
