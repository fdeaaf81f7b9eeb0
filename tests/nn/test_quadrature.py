"""Galerkin attention as a module, against its operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import GalerkinAttention
from attn_lab.nn.layers import split_heads

X = jax.random.normal(jax.random.key(0), (2, 6, 8))


def make(**arguments):
    return GalerkinAttention(8, **dict(num_heads=2, causal=False, rngs=nnx.Rngs(0)) | arguments)


def run(mixer, **options):
    return nnx.jit(lambda mixer, x: mixer(x, **options))(mixer, X)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
def test_without_coordinates_it_is_the_operator(kind):
    mixer = make(kind=kind, pos_dim=0, xavier_init=0.0)
    norms = [p[...] + 0.1 for pair in mixer.norms.values() for p in pair]
    for p, value in zip([p for pair in mixer.norms.values() for p in pair], norms):
        p[...] = value
    heads = (split_heads(mixer.projections[n](X), 2) for n in "qkv")
    operator = ops.galerkin_attention if kind == "galerkin" else ops.fourier_attention
    named = dict(zip((f"{p}_{n}" for n in mixer.norms for p in ("weight", "bias")), norms))
    want = operator(*heads, **named)
    close(run(mixer), mixer.out(want.reshape(X.shape)))


@pytest.mark.parametrize("kind", ["galerkin", "fourier", "linear", "softmax"])
def test_coordinates_precede_the_channels_of_every_head(kind):
    mixer = make(kind=kind, pos_dim=2)
    place = jax.random.normal(jax.random.key(1), (2, 6, 2))
    heads = {n: split_heads(mixer.projections[n](X), 2) for n in "qkv"}
    for n in "kv" if kind in ("galerkin", "linear") else "qk":
        heads[n] = ops.head_layer_norm(heads[n], jnp.ones((2, 4)), jnp.zeros((2, 4)))
    q, k, v = (
        jnp.concatenate([jnp.repeat(place[:, :, None], 2, 2), y], -1) for y in heads.values()
    )
    scores = jnp.einsum("bthd,bshd->bths", q, k)
    if kind == "linear":
        scores = jnp.einsum("bthd,bshd->bths", jax.nn.softmax(q), jax.nn.softmax(k, 1))
    weights = {
        "galerkin": lambda: scores / 6,
        "fourier": lambda: scores / 6 / 6**0.5,
        "linear": lambda: scores / 6,
        "softmax": lambda: jax.nn.softmax(scores / 6**0.5),
    }[kind]()
    want = jnp.einsum("bths,bshd->bthd", weights, v).reshape(2, 6, 12)
    close(run(mixer, coordinates=place), mixer.out(want))


def test_the_first_coordinates_run_from_0_to_1_and_projections_are_near_the_identity():
    mixer = make()
    place = jnp.broadcast_to(jnp.linspace(0, 1, 6)[:, None], (2, 6, 1))
    close(run(mixer), run(mixer, coordinates=place))
    kernel = mixer.projections["k"].kernel[...]
    assert 0 < jnp.abs(kernel - 0.01 * jnp.eye(8)).max() < 1e-4 * (6 / 16) ** 0.5
    assert (mixer.projections["k"].bias[...] == 0).all()


def test_errors_name_what_does_not_fit():
    for arguments, message in (
        ({"kind": "cosine"}, "kind must be one of galerkin"),
        ({"causal": True}, "causal must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**arguments)
    with pytest.raises(ValueError, match=r"coordinates must be .* got None"):
        make(pos_dim=2)(X)
    with pytest.raises(ValueError, match="segment_ids need"):
        make()(X, segment_ids=jnp.zeros((2, 6), int))
