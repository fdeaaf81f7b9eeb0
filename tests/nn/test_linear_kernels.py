"""Mixers of linear kernels, against their operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import (
    FastmaxAttention,
    LogNormalAttention,
    LogNormalDiagAttention,
    SimplifiedLinearAttention,
)
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 12, 16))


def make(kind, **arguments):
    build = dict(kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0))
    return kind(16, **build | arguments)


def run(mixer, x=X, **options):
    return nnx.jit(lambda mixer, x: mixer(x, **options))(mixer, x)


def heads(mixer, x=X):
    return [split_heads(part, 4) for part in jnp.split(mixer.qkv(x), 3, -1)]


def close(got, want, tolerance=1e-4):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("normalize", ["standardize", "none"])
def test_fastmax_is_its_operator(normalize):
    mixer = make(FastmaxAttention, normalize=normalize, kernel_init=nnx.initializers.normal(0.2))
    want = ops.fastmax_attention(*heads(mixer), causal=True, normalize=normalize)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    assert mixer.state_bytes(1000) == 4 * 4 * (1 + 4 + 10) * (4 + 1)


def test_a_normalisation_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match="normalize must be 'standardize' or 'none'"):
        make(FastmaxAttention, normalize="max")


def test_log_normal_attention_has_the_temperatures_that_it_was_given():
    mixer = make(LogNormalAttention, alpha=0.4, beta=0.3)
    want = ops.linear_log_normal_attention(*heads(mixer), alpha=0.4, beta=0.3, causal=True)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    mixer = make(LogNormalAttention, kernel_init=nnx.initializers.normal(0.25))
    unit = dict(zip(("alpha", "beta"), ops.log_normal_temperatures(1.0, 1.0)))
    want, _ = ops.causal_log_normal_attention(*heads(mixer), **unit)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    assert mixer.state_bytes(1000) == 4 * 4 * (4 * 5 + 1)


@pytest.mark.parametrize("kind", [LogNormalAttention, LogNormalDiagAttention])
def test_without_causality_log_normal_attention_matches_the_moments_of_the_call(kind):
    mixer = make(kind, causal=False)
    if kind is LogNormalAttention:
        want = ops.linear_log_normal_attention(*heads(mixer))
    else:
        parts = [split_heads(f(X), 4) for f in (mixer.query, mixer.key, mixer.value)]
        want = ops.linear_log_normal_diag_attention(*parts, block_size=64)
    close(run(mixer), mixer.out(want.reshape(X.shape)))
    with pytest.raises(ValueError, match="segment_ids need causal=True"):
        mixer(X, segment_ids=jnp.zeros((2, 12), int))


def test_the_diagonal_has_its_share():
    mixer = make(LogNormalDiagAttention, block_size=4, learned=True)
    far, near = mixer.shares
    whole = run(mixer)
    near[...] = jnp.zeros_like(near[...])
    plain = run(mixer)
    near[...], far[...] = jnp.full_like(far[...], 0.5), jnp.zeros_like(far[...])
    close(plain + run(mixer), whole)
    assert make(LogNormalDiagAttention, block_size=4).state_bytes(99) == 4 * (
        4 * (4 * 5 + 1) + 2 * 3 * 16
    )
    with pytest.raises(ValueError, match="no attention weights"):
        mixer.weights(X)


def test_simplified_attention_gives_every_place_of_the_image_a_key_of_its_own():
    mixer = make(SimplifiedLinearAttention, causal=False, grid=(3, 4))
    kernel, bias = mixer.conv_kernel[...], mixer.conv_bias[...]
    q, k, v = heads(mixer)
    close(
        run(mixer),
        mixer.out(
            ops.simplified_linear_attention(q, k, v, kernel, bias, height=3, width=4).reshape(
                X.shape
            )
        ),
    )
    mixer.positions[...] = table = jax.random.normal(jax.random.key(1), (12, 16))
    moved = ops.simplified_linear_attention(
        q, k + split_heads(table, 4), v, kernel, bias, height=3, width=4
    )
    close(run(mixer), mixer.out(moved.reshape(X.shape)))
    with pytest.raises(ValueError, match="tokens of the grid"):
        mixer(X[:, :9])
    with pytest.raises(ValueError, match="grid must be given"):
        make(SimplifiedLinearAttention, causal=False, context=12)
