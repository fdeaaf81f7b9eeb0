"""Mixers whose learned numbers start where they change nothing, with other numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab.nn import Build, GatedPositionalAttention, find_mixer, make_mixer

CASES = [
    ("length_scaled_attention", {}),
    ("length_scaled_attention", {"mode": "log_base"}),
    ("multi_token_attention", {"query_kernel": 3, "key_kernel": 5, "head_kernel": 2}),
    ("multi_token_attention", {"query_kernel": 1, "key_kernel": 3, "group_norm": False}),
    ("multi_token_attention", {"window": 4, "num_kv_heads": 2, "rope_theta": 100.0, "gate": None}),
    ("relative_position_bias", {"num_buckets": 6, "max_distance": 8, "scale": 1.0}),
    ("relational_attention", {"relation_activation": "relu", "num_relations": 4}),
]
X = jax.random.normal(jax.random.key(0), (2, 9, 16))


def moved(mixer):
    """The mixer with noise on every parameter."""
    graph, params = nnx.split(mixer)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves)]
    return nnx.merge(graph, jax.tree.unflatten(treedef, leaves))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "arguments"), CASES)
def test_decoding_and_packed_rows_are_a_call_alone(name, arguments):
    mixer = moved(make_mixer(name, 16, arguments, Build(nnx.Rngs(0)), context=9))
    want, call = mixer(X), nnx.jit(lambda mixer, x, cache: mixer(x, cache=cache))
    parts, cache = [], mixer.init_cache(2, 12)
    for cut in slice(0, 4), slice(4, 5), slice(5, 9):
        y, cache = call(mixer, X[:, cut], cache)
        parts.append(y)
    close(jnp.concatenate(parts, 1), want)
    ids = jnp.array([[0] * 4 + [1] * 5] * 2)
    packed = mixer(X, segment_ids=ids)
    close(packed[:, :4], want[:, :4])
    close(packed[:, 4:], mixer(X[:, 4:]))


def test_first_scale_is_that_of_the_length():
    mixer = find_mixer("qk_norm_attention")(16, context=75, rngs=nnx.Rngs(0))
    assert abs(float(mixer.cosine_scale[...]) - 12.438) < 1e-3


def test_grid_heads_begin_as_a_convolution():
    mixer = GatedPositionalAttention(36, shape=(3, 4), num_heads=9, strength=50.0, rngs=nnx.Rngs(0))
    mixer.gate[...] = jnp.full(9, 99.0)
    weights = mixer.weights(jnp.ones((1, 12, 36)))[0].reshape(9, 3, 4, 3, 4)
    reads = weights[:, 1, 1].reshape(9, 12).argmax(-1)
    assert [divmod(int(n), 4) for n in reads] == [(y, x) for x in range(3) for y in range(3)]
    assert (weights[:, 1, 1].max((1, 2)) > 0.99).all()
    for part in {"segment_ids": jnp.zeros((1, 12), int)}, {"cache": mixer.init_cache(1, 12)}:
        with pytest.raises(ValueError, match=r"takes no window|needs causal"):
            mixer(jnp.ones((1, 12, 36)), **part)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("multi_token_attention", {"key_kernel": 4}, "the second odd"),
        ("multi_token_attention", {"gate": "vector"}, "gate must be None or 'scalar'"),
        ("multi_token_attention", {"head_kernel": 3}, "head_kernel"),
        ("differential_integral_attention", {"window": 4}, "window must be None"),
        ("relational_attention", {"num_relations": 3}, "num"),
        ("relational_attention", {"num_sensory_heads": 3}, "must divide the width 16"),
    ],
)
def test_errors_name_the_argument(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        find_mixer(name)(16, rngs=nnx.Rngs(0), **arguments)


@pytest.mark.parametrize("name", ["qk_norm_attention", "selective_attention", "alibi_bias"])
def test_scores_of_another_kind_are_not_captured(name):
    mixer = find_mixer(name)(16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no scores to capture"):
        mixer.scores(X)
    np.testing.assert_allclose(mixer.weights(X).sum(-1), 1, rtol=1e-5)
