"""Weights from another stream: a layout's, and an encoder's in a window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import LuongAttention, PredictedCenter, SkimAttention, SkimLayer

H = jax.random.normal(jax.random.key(0), (2, 7, 6))
MEMORY = jax.random.normal(jax.random.key(1), (2, 9, 6))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def luong(**arguments):
    return LuongAttention(6, **arguments, rngs=nnx.Rngs(0))


def test_one_skim_serves_layers_of_other_texts():
    layout = jax.random.normal(jax.random.key(2), (2, 5, 8))
    skim = SkimAttention(8, num_heads=2, head_dim=3, rngs=nnx.Rngs(0))
    layer = SkimLayer(6, num_heads=2, value_dim=4, rngs=nnx.Rngs(1))
    q, k = (part(layout).reshape(2, 5, 2, 3) for part in (skim.query, skim.key))
    for x in H[:, :5], H[:, 2:]:
        heads = ops.dot_product_attention(q, k, layer.value(x).reshape(2, 5, 2, 4))
        close(layer(x, skim(layout)), layer.out(heads.reshape(2, 5, 8)))


@pytest.mark.parametrize("causal", [False, True])
def test_skim_weights_keep_documents_and_the_future_apart(causal):
    layout = jax.random.normal(jax.random.key(2), (1, 5, 8))
    skim = SkimAttention(8, causal=causal, rngs=nnx.Rngs(0))
    call = nnx.jit(lambda skim, layout, ids: skim(layout, segment_ids=ids))
    packed = call(skim, layout, jnp.array([[0, 0, 1, 1, 1]]))
    close(packed[:, :, :2, :2], call(skim, layout[:, :2], None))
    close(packed[:, :, 2:, 2:], call(skim, layout[:, 2:], None))
    assert (packed[:, :, :2, 2:] == 0).all() and (packed[:, :, 2:, :2] == 0).all()
    assert bool((jnp.triu(packed, 1) == 0).all()) is causal


def test_skim_layers_need_their_heads():
    layer = SkimLayer(6, num_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have 2 heads"):
        layer(H, jnp.ones((2, 3, 7, 7)))


@pytest.mark.parametrize("method", ["dot", "general"])
def test_predicted_windows_are_the_operator(method):
    attend = luong(method=method, local="predicted", half_width=3)
    h = 3 * H
    q = h if method == "dot" else h @ attend.score[...]
    center = attend.center(h, 9)
    assert center.shape == (2, 7, 1) and 0 < center.min() and center.max() < 9
    memory = MEMORY[:, :, None]
    context = ops.gaussian_local_attention(q[:, :, None], memory, memory, center, 3.0)[:, :, 0]
    close(attend(h, MEMORY), jnp.tanh(attend.out(jnp.concatenate([context, h], -1))))


def test_centers_of_heads_are_parts_of_each_length():
    center = PredictedCenter(6, hidden=4, num_heads=3, rngs=nnx.Rngs(0))
    got = center(H, jnp.array([5, 10]))
    hidden = jnp.tanh(H @ center.hidden.kernel[...]) @ center.place.kernel[...]
    close(got, jnp.array([5.0, 10.0])[:, None, None] / (1 + jnp.exp(-hidden)))


def test_general_with_the_identity_is_dot():
    attend = luong(method="general")
    attend.score[...] = jnp.eye(6)
    close(attend.weights(H, MEMORY), luong(method="dot").weights(H, MEMORY))


def test_monotonic_windows_follow_the_step():
    attend = luong(local="monotonic", half_width=1)
    weights = attend.weights(H, MEMORY)[0, 0]
    reads = [list(np.flatnonzero(row)) for row in weights]
    assert reads == [[0, 1]] + [[t - 1, t, t + 1] for t in range(1, 7)]
    close(weights.sum(-1), 1)
    close(attend(H[:, 4:], MEMORY, start=4), attend(H, MEMORY)[:, 4:])
    assert (attend.weights(H, MEMORY, start=10) == 0).all()


@pytest.mark.parametrize(
    ("method", "local"),
    [("dot", "none"), ("general", "predicted"), ("concat", "monotonic"), ("location", "predicted")],
)
def test_padding_has_no_influence_and_parameters_have_gradients(method, local):
    attend = luong(method=method, local=local, half_width=4, max_keys=9)
    mask = jnp.arange(9) < jnp.array([[6], [6]])
    got = nnx.jit(lambda attend: attend(H, MEMORY, mask=mask))(attend)
    close(got, nnx.jit(lambda attend: attend(H, MEMORY[:, :6]))(attend))
    assert got.shape == H.shape and jnp.abs(got).max() < 1
    grads = nnx.jit(nnx.grad(lambda attend: jnp.sin(attend(H, MEMORY)).sum()))(attend)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all() and (grad[...] != 0).any(), path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "mlp"}, "method must be one of dot"),
        ({"local": "window"}, "local must be 'none'"),
        ({"half_width": 0}, "half_width must be positive"),
        ({"method": "dot", "memory_width": 5}, "memory_width=5 must be width=6"),
        ({"method": "location"}, "max_keys must be a number"),
    ],
)
def test_errors_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        luong(**arguments)
