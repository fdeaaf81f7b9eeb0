import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab import ops


def inputs(q_len=6, k_len=9, heads=4, kv_heads=2, dim=4):
    keys = jax.random.split(jax.random.key(q_len), 3)
    shapes = (2, q_len, heads, dim), (2, k_len, kv_heads, dim), (2, k_len, kv_heads, 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


OPERATORS = {
    "clipped": lambda q, k, v: ops.clipped_softmax_attention(q, k, v, gamma=-0.05),
    "entmax": lambda q, k, v: ops.entmax_attention(q, k, v, 1.5),
    "sinkhorn": ops.sinkhorn_attention,
    "relu": ops.relu_attention,
    "taylor": ops.taylor_attention,
    "top_k": lambda q, k, v: ops.topk_attention(q, k, v, top_k=3),
    "hard": ops.straight_through_hard_attention,
    "compositional": ops.compositional_attention,
}


@settings(max_examples=6, deadline=None)
@given(st.sampled_from(sorted(OPERATORS)), st.permutations(range(9)), st.permutations(range(6)))
def test_permuting_keys_changes_nothing_and_queries_permute_the_output(name, keys, queries):
    q, k, v = inputs()
    out = OPERATORS[name](q, k, v)
    keys, queries = jnp.array(keys), jnp.array(queries)
    close(OPERATORS[name](q[:, queries], k[:, keys], v[:, keys]), out[:, queries], 1e-4)


def test_softmax_is_a_case_of_the_others():
    q, k, v = inputs()
    want = ops.dot_product_attention(q, k, v, causal=True)
    close(ops.clipped_softmax_attention(q, k, v, gamma=0.0, causal=True), want)
    close(ops.entmax_attention(q, k, v, 1.001, causal=True), want, 5e-3)
    close(ops.topk_attention(q, k, v, top_k=9, causal=True), want)
    close(ops.sinkhorn_attention(q, k, v, num_iters=1), ops.dot_product_attention(q, k, v))


def test_the_best_key_alone():
    q, k, v = inputs()
    hard = ops.straight_through_hard_attention(q, k, v, causal=True)
    close(hard, ops.topk_attention(q, k, v, top_k=1, causal=True))
    ties = ops.straight_through_hard_attention(q, 0 * k, v)
    close(ties, jnp.repeat(v[:, :1], 2, 2) * jnp.ones((1, 6, 1, 1)))
    slope = jax.grad(lambda k: jnp.sum(jnp.sin(ops.straight_through_hard_attention(q, k, v))))(k)

    def surrogate(k):
        out = ops.straight_through_hard_attention(q, k, v)
        soft = ops.dot_product_attention(q, k, v)
        return jnp.sum(jnp.cos(jax.lax.stop_gradient(out)) * soft)

    close(slope, jax.grad(surrogate)(k))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2), st.floats(1.1, 2.0), st.integers(0, 99))
def test_entmax_along_any_axis_with_a_mask_and_many_alphas(axis, alpha, seed):
    x = jax.random.normal(jax.random.key(seed), (3, 4, 5))
    mask = jax.random.bernoulli(jax.random.key(seed + 1), 0.7, x.shape)
    weights = ops.entmax(x, alpha, axis=axis, mask=mask)
    some = mask.any(axis)
    close(weights.sum(axis), some.astype(float))
    assert (jnp.where(mask, 0, weights) == 0).all() and (weights >= 0).all()
    shape = [n if a == 0 and axis != 0 else 1 for a, n in enumerate(x.shape)]
    alphas = jnp.linspace(1.2, 2, shape[0]).reshape(shape)
    many = ops.entmax(x, alphas, axis=axis)
    first = ops.entmax(x, float(alphas.reshape(-1)[0]), axis=axis)
    close(many[:1], first[:1])


def test_sparsemax_projects_onto_the_simplex():
    x = jax.random.normal(jax.random.key(0), (5, 7))
    close(ops.sparsemax(ops.sparsemax(x)), ops.sparsemax(x))
    close(ops.sparsemax(x), ops.entmax(x, 2.0))
    close(ops.entmax15(x), ops.entmax(x + 3, 1.5))


def test_sinkhorn_scales_rows_and_columns():
    scores = jax.random.normal(jax.random.key(0), (1, 2, 4, 6))
    close(ops.sinkhorn(scores, num_iters=5).sum(-1), 1)
    close(ops.sinkhorn(scores, num_iters=6).sum(-2), 4 / 6)
    close(ops.sinkhorn(scores + 3 * jnp.arange(4.0)[:, None]), ops.sinkhorn(scores), 1e-4)
    mask = jnp.ones((4, 6), bool).at[2].set(False).at[:, 1].set(False)
    weights = ops.sinkhorn(scores, mask=mask)
    assert (weights[..., 2, :] == 0).all() and (weights[..., 1] == 0).all()


def test_relu_weights():
    q, k, v = inputs(kv_heads=4)
    ones = jnp.ones_like(q), jnp.ones_like(k)
    mean = ops.relu_attention(*ones, v, length_scaling="inverse", scale=0.25)
    close(mean, v.mean(1, keepdims=True) * jnp.ones((1, 6, 1, 1)))
    assert (ops.relu_attention(ones[0], -ones[1], v) == 0).all()
    scale, gate = jnp.ones(12), jnp.zeros(12)
    plain = ops.rectified_linear_attention(q, k, v, scale)
    close(ops.rectified_linear_attention(7 * q, k, 5 * v, scale), plain, 1e-4)
    close(ops.rectified_linear_attention(q, k, v, scale, gate), plain / 2)


def test_standardised_weights_sum_to_zero_and_ignore_scales():
    q, k, v = inputs()
    gain, zero = jnp.ones(4), jnp.zeros(4)
    out = ops.normalized_attention(q, k, v, gain, zero)
    close(ops.normalized_attention(q, k, v + 7, gain, zero), out, 1e-4)
    close(
        ops.normalized_attention(5 * q, k, v, gain, zero, eps=0),
        ops.normalized_attention(q, k, v, gain, zero, eps=0),
    )
    pooled = jnp.repeat(v.mean(1, keepdims=True), 2, 2) * 3 * jnp.ones((1, 6, 1, 1))
    close(ops.normalized_attention(q, k, v, zero, gain), pooled)


def test_complex_scores_with_plain_phases_are_rotary_attention():
    q, k, v = inputs(k_len=6)
    ones, positions = jnp.ones((4, 2)), jnp.arange(6)
    turned = (ops.apply_rotary(x, positions) for x in (q, k))
    want = ops.dot_product_attention(*turned, v, scale=1.0, causal=True)
    close(ops.complex_attention(q, k, v, ones, 0 * ones, causal=True), want, 1e-4)


def test_compositional_gates():
    q, _, v = inputs(kv_heads=4, k_len=6)
    out = ops.compositional_attention(q, q, v)
    weights = jnp.tanh(jnp.einsum("bthd,bshd->bhts", q, q) / 2)
    gate = 2 * jax.nn.sigmoid(-jnp.abs(q[:, :, None] - q[:, None]).sum(-1) / 2)
    close(out, jnp.einsum("bhts,bshd->bthd", weights * jnp.moveaxis(gate, -1, 1), v))
    assert (
        ops.compositional_attention(-q, q, v, beta=0.0)
        == -ops.compositional_attention(q, q, v, beta=0.0)
    ).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: ops.relu_attention(q, k, v, length_scaling="log"), "sqrt_half, inverse"),
        (lambda q, k, v: ops.similarity_attention(q, k, v, similarity="cos"), "sigmoid, elu1"),
        (lambda q, k, v: ops.topk_attention(q, k, v, top_k=0), "top_k must be at least 1"),
        (lambda q, k, v: ops.compositional_attention(q, k, v, gate="soft"), "gate must be"),
        (lambda q, k, v: ops.rectified_linear_attention(q, k, v, v[0, 0, 0]), "norm_scale must be"),
        (
            lambda q, k, v: ops.complex_attention(q, k, v, q[0, 0], q[0, 0]),
            "must be \\[H, D / 2\\]",
        ),
        (lambda q, k, v: ops.mlp_score_attention(q, k, v, *[q[0, 0]] * 6), "w1 must be"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(*inputs())
