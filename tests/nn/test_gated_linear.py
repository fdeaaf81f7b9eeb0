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

    @nnx.jit
    def both(layer, x):
        q, k, v = (split_heads(part, 4) for part in jnp.split(layer.qkv(x), 3, -1))
        gate, refine = (split_heads(part, 4) for part in jnp.split(layer.gates(x), 2, -1))
        heads = ops.refined_gated_linear_attention(q, k, v, 1 + gate, refine)
        return layer(x), layer.out(layer.norm(heads).reshape(x.shape))

    close(*both(layer, X))


def test_a_key_beyond_the_range_of_exponentials_disturbs_no_token_before_it():
    layer = mixer()
    total = lambda x: (lambda y: (y.sum(), y))(layer(x))  # noqa: E731
    call = jax.jit(jax.value_and_grad(total, has_aux=True))
    (_, y), slopes = call(X.at[:, 12].multiply(1e3))
    np.testing.assert_array_equal(y[:, :12], call(X)[0][1][:, :12])
    assert jnp.isfinite(y).all() and jnp.isfinite(slopes).all()


def test_padding_between_and_before_the_parts_of_a_document_is_passed_over():
    layer, x = mixer(), X[:, :7]
    ids = jnp.array([[-1, 0, 0, -1, 0, 1, 1]] * 2)

    def first(x):
        y = layer(x, segment_ids=ids)
        return y[:, 1:3].sum(), y

    loud = x.at[:, 0].multiply(100).at[:, 3].multiply(100)
    (_, y), slopes = jax.jit(jax.value_and_grad(first, has_aux=True))(loud)
    call = nnx.jit(lambda layer, x: layer(x))
    close(y[:, jnp.array([1, 2, 4])], call(layer, x[:, jnp.array([1, 2, 4])]))
    close(y[:, 5:], call(layer, x[:, 5:]))
    assert jnp.isfinite(slopes).all() and not slopes[:, 0].any() and not slopes[:, 3:].any()


def test_the_gates_start_open():
    layer = mixer()
    assert (layer.gate_bias[...] == 1).all() and not layer.refine_bias[...].any()
