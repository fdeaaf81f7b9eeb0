"""Chunks with overlap against whole documents, and soft counts against a loop over windows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import ChunkedEncoder, KernelPooling, MultiHeadAttention

X = jax.random.normal(jax.random.key(0), (2, 11, 8))
MASK = jnp.arange(11) < jnp.array([[11], [3]])


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def mixer():
    return MultiHeadAttention(8, num_heads=2, causal=False, rngs=nnx.Rngs(0))


def pooling(**arguments):
    arguments = {"mu": (1.0, 0.3, -0.4), "sigma": 0.2, "window": 4} | arguments
    return KernelPooling(**arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("chunk", "overlap"), [(4, 1), (3, 4), (20, 2)])
def test_one_layer_in_chunks_is_attention_under_a_halo_mask(chunk, overlap):
    layer = mixer()
    q, k, v, _, _ = layer._inputs(X, None, None)
    heads = ops.dot_product_attention(q, k, v, mask=ops.halo_mask([11], chunk, overlap))
    close(ChunkedEncoder(layer, chunk=chunk, overlap=overlap)(X), layer._project(heads, X))


@pytest.mark.parametrize("max_chunks", [None, 4])
def test_padding_has_no_influence_and_empty_chunks_need_no_encoding(max_chunks):
    encoder = ChunkedEncoder(mixer(), chunk=4, overlap=2)
    noise = jnp.where(MASK[..., None], X, jnp.nan)
    got = nnx.jit(lambda e, x: e(x, mask=MASK, max_chunks=max_chunks))(encoder, noise)
    call = nnx.jit(lambda e, x: e(x))
    close(got[0], call(encoder, X[:1])[0])
    close(got[1, :3], call(encoder, X[1:, :3])[0])
    assert (got[1, 3:] == 0).all()


def test_only_so_many_chunks_are_encoded():
    seen, layer = [], mixer()

    def encode(x, segment_ids):
        seen.append(x.shape)
        return layer(x, segment_ids=segment_ids)

    encoder = ChunkedEncoder(encode, chunk=4, overlap=2)
    encoder(X, mask=MASK, max_chunks=4)
    assert seen == [(4, 8, 8)]
    assert jnp.isnan(encoder(X, mask=MASK, max_chunks=3)).any()


@nnx.jit
def score(module, *inputs, **masks):
    return module(*inputs, **masks)


def reference(module, query, document, influence):
    """Scores of one pair, window by window."""
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, document)]
    cosine = (unit[0] @ unit[1].T)[..., None]
    kernels = np.exp(-((cosine - np.array(module.mu)) ** 2) / (2 * np.array(module.sigma) ** 2))
    scores, start = [], 0
    while True:
        part = kernels[:, start : start + module.window]
        counts = np.maximum(part.sum(1), 1e-10)
        if module.mult is not None:
            soft = np.log(counts * np.array(module.mult))
        else:
            factors = np.stack([influence, np.full_like(influence, part.shape[1])], -1)
            a, b, c = (factors @ np.array(module.slopes) + np.array(module.offsets)).T[..., None]
            soft = a * counts ** (1 / b) - c
        scores.append(float((soft.sum(0) * np.array(module.kernel_weight)).sum()))
        if start + module.window >= document.shape[0]:
            break
        start += module.stride
    best = sorted(scores, reverse=True)[: module.top]
    return sum(gain * score for gain, score in zip(np.array(module.gain), best))


@pytest.mark.parametrize("saturation", ["power", "log"])
@pytest.mark.parametrize("length", [3, 9])
def test_scores_are_those_of_a_loop_over_windows(saturation, length):
    module = pooling(saturation=saturation)
    module.gain[...] = jnp.array([1.0, 0.5, 0.2])
    if module.mult is not None:
        module.mult[...] = jnp.array([1.0, 2.0, 0.5])
    else:
        module.slopes[...] *= 300
    query, influence = X[:, :3], jnp.array([[0.3, 2.0, 1.0], [1.0, 0.0, 4.0]])
    got = score(module, query, X[:, :length], influence=influence)
    for n in range(2):
        pair = np.array(query[n]), np.array(X[n, :length]), np.array(influence[n])
        np.testing.assert_allclose(got[n], reference(module, *pair), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("saturation", ["power", "log"])
def test_padding_of_queries_and_documents_has_no_influence(saturation):
    module = pooling(saturation=saturation)
    query, document = X[1:, :5], X[1:]
    masks = {"query_mask": jnp.arange(5)[None] < 3, "mask": MASK[1:]}
    np.testing.assert_allclose(
        score(module, query, document, **masks),
        score(module, query[:, :3], document[:, :3]),
        rtol=1e-3,
    )
    assert (score(module, query, document, mask=jnp.zeros((1, 11), bool)) == 0).all()


@pytest.mark.parametrize("saturation", ["power", "log"])
def test_every_parameter_gets_a_finite_gradient(saturation):
    def loss(module):
        return module(X[:, :3], X, mask=MASK, influence=jnp.ones((2, 3))).sum()

    for path, grad in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(pooling(saturation=saturation))):
        assert jnp.isfinite(grad[...]).all() and (grad[...] != 0).any(), path


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        ChunkedEncoder(mixer(), chunk=0)
    for arguments, message in [
        ({"sigma": (0.1, 0.2)}, "sigma must be positive, one or one for each of 3"),
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"stride": 5}, "stride=5 must be from 1 to window=4"),
        ({"saturation": "idf"}, "saturation must be 'power' or 'log'"),
    ]:
        with pytest.raises(ValueError, match=message):
            pooling(**arguments)
