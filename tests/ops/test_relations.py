import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops
from attn_lab.ops import relations

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
SHAPES = {
    "q": (2, 7, 4, 3),
    "k": (2, 9, 2, 3),
    "q_rel": (2, 7, 5, 2),
    "k_rel": (2, 9, 5, 2),
    "w_rel": (4, 6, 5),
    "symbols": (2, 9, 2, 6),
}


def relational(**changes):
    shapes = SHAPES | changes
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {n: jax.random.normal(key, shape) for key, (n, shape) in zip(keys, shapes.items())}


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh"])
@pytest.mark.parametrize("causal", [False, True])
def test_relations_by_the_definition(activation, causal, monkeypatch):
    """Against `[T, S]` relations, with blocks that do not divide the queries."""
    monkeypatch.setattr(relations, "ROWS", 3)
    x = relational()
    _, weights = ops.dot_product_attention(
        x["q"], x["k"], x["symbols"], causal=causal, return_weights=True
    )
    act = {"identity": lambda x: x, "relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    related = act(jnp.einsum("btrd,bsrd->btsr", x["q_rel"], x["k_rel"]) / 2**0.5)
    symbols = jnp.repeat(x["symbols"], 2, 2)
    want = jnp.einsum("bhts,bshv->bthv", weights, symbols)
    want += jnp.einsum("bhts,btsr,hvr->bthv", weights, related, x["w_rel"])
    got = ops.relational_attention(**x, relation_activation=activation, causal=causal)
    close(got, want)


@pytest.mark.parametrize("activation", ["identity", "sigmoid"])
def test_without_relations_symbols_are_values(activation):
    x = relational(w_rel=(4, 6, 5))
    x["w_rel"] = jnp.zeros_like(x["w_rel"])
    got = ops.relational_attention(**x, relation_activation=activation)
    close(got, ops.dot_product_attention(x["q"], x["k"], x["symbols"]))


def mta(length=7, keys=7):
    key = jax.random.split(jax.random.key(1), 6)
    q = jax.random.normal(key[0], (2, length, 4, 3))
    k, v = (jax.random.normal(n, (2, keys, 2, 3)) for n in key[1:3])
    kernel, post = (jax.random.normal(n, (4, 3, 5)) for n in key[3:5])
    mix = jax.random.normal(key[5], (2, 2, 2))
    return (q, k, v, kernel), dict(kernel_post=post, head_mix_pre=mix, head_mix_post=mix.mT)


def delta():
    return jnp.zeros((4, 3, 5)).at[:, -1, 2].set(1)


@pytest.mark.parametrize("causal", [False, True])
def test_identity_kernels_are_softmax_attention(causal):
    (q, k, v, _), _ = mta()
    eye = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))
    part = dict(kernel_post=delta(), head_mix_pre=eye, head_mix_post=eye)
    got = ops.multi_token_attention(q, k, v, delta(), causal=causal, **part)
    close(got, ops.dot_product_attention(q, k, v, causal=causal))
    scores = jax.random.normal(jax.random.key(0), (2, 4, 7, 9))
    close(ops.key_query_convolution(scores, delta(), causal=False), scores)


def test_pipeline_by_the_definition_and_blocks_agree(monkeypatch):
    (q, k, v, kernel), part = mta(6, 8)
    scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) / 3**0.5
    allowed = jnp.tril(jnp.ones((6, 8), bool), 2)

    def mix(x, matrix):
        return jnp.stack(
            [
                sum(matrix[g, i, h] * x[:, 2 * g + h] for h in (0, 1))
                for g in (0, 1)
                for i in (0, 1)
            ],
            1,
        )

    x = mix(ops.key_query_convolution(scores, kernel), part["head_mix_pre"])
    weights = jax.nn.softmax(jnp.where(allowed, x, -jnp.inf))
    weights = ops.key_query_convolution(weights, part["kernel_post"])
    weights = mix(jnp.where(allowed, weights, 0), part["head_mix_post"])
    want = jnp.einsum("bhts,bshd->bthd", weights, jnp.repeat(v, 2, 2))
    close(ops.multi_token_attention(q, k, v, kernel, **part), want)
    monkeypatch.setattr(relations, "ROWS", 4)
    close(ops.multi_token_attention(q, k, v, kernel, **part), want)


def test_convolution_is_a_cross_correlation_and_the_future_counts_as_zero():
    scores = jnp.arange(1.0, 10).reshape(1, 1, 3, 3)
    left_above = jnp.zeros((1, 2, 3)).at[0, 0, 0].set(1)
    got = ops.key_query_convolution(scores, left_above, causal=False)[0, 0]
    assert got.tolist() == [[0, 0, 0], [0, 1, 2], [0, 4, 5]]
    got = ops.key_query_convolution(scores, left_above)[0, 0]
    assert got.tolist() == [[0, 0, 0], [0, 1, 0], [0, 4, 5]]


def test_a_masked_key_has_no_influence():
    (q, k, v, kernel), part = mta()
    mask = jnp.ones((7, 7), bool).at[:, 3].set(False)
    slopes = jax.grad(
        lambda k, v: jnp.sum(ops.multi_token_attention(q, k, v, kernel, mask=mask, **part)), (0, 1)
    )(k, v)
    for slope in slopes:
        assert (slope[:, 3] == 0).all() and (slope[:, 2] != 0).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, p: ops.multi_token_attention(*a[:3], a[3][:2]), r"kernel must be \[4, cq, ck\]"),
        (lambda a, p: ops.multi_token_attention(*a, kernel_post=a[3][..., 1:]), "kernel_post must"),
        (lambda a, p: ops.multi_token_attention(*a, head_mix_pre=jnp.ones((1, 2, 2))), "head_mix_"),
        (
            lambda a, p: ops.relational_attention(**p, relation_activation="exp"),
            "'exp' must be one",
        ),
        (lambda a, p: ops.relational_attention(**p | {"w_rel": p["q"]}), r"\[4, 6, 5\]"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(mta()[0], relational())
