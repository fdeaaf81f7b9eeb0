import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import LocalLinearAttention, MultiHeadAttention

WITH = dict(num_heads=2, kernel_init=nnx.initializers.normal(0.5))


def make(**arguments):
    return LocalLinearAttention(8, **WITH | arguments, rngs=nnx.Rngs(0))


def tokens(length=7):
    return jax.random.normal(jax.random.key(length), (2, length, 8))


def test_a_large_ridge_is_softmax_attention_and_the_solvers_agree():
    x = tokens()
    run = nnx.jit(lambda mixer: mixer(x))
    softmax = MultiHeadAttention(8, **WITH, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(run(make(ridge=1e7)), run(softmax), rtol=1e-4, atol=1e-5)
    direct, cg = run(make(ridge=1.0)), run(make(ridge=1.0, solver="cg"))
    np.testing.assert_allclose(cg, direct, rtol=1e-4, atol=1e-4)
    assert jnp.abs(direct - run(softmax)).max() > 0.1


def test_weights_may_be_negative_and_sum_to_one():
    weights = make(ridge=0.01).weights(tokens())
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-3)
    assert (weights < -0.01).any() and (jnp.triu(weights, 1) == 0).all()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="ridge must be positive"):
        make(ridge=0.0)
    with pytest.raises(ValueError, match="needs plain softmax"):
        make(dropout=0.1)
