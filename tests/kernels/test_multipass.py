import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_kernels.attention import (
    LengthScaled,
    Mask,
    Proportional,
    Score,
    ScoreMod,
    Sinkhorn,
    Standardized,
    TopK,
    api,
    attention,
    attention_weights,
    clipped_softmax,
    entmax,
    normalize,
    operand,
    passes,
    softmax,
    streaming,
)


def taylor(s):
    return 1 + s + s**2 / 2


def causal(b, h, q_index, k_index):
    return k_index <= q_index


def same(b, h, q_index, k_index, q_ids, k_ids):
    return q_ids == k_ids


NORMALIZERS = {
    "clipped": lambda a: clipped_softmax(-0.05 * a[0], 1.02),
    "entmax": lambda a: entmax(1 + a),
    "sinkhorn": lambda a: Sinkhorn(3),
    "sinkhorn_even": lambda a: Sinkhorn(4),
    "standardized": lambda a: Standardized(operand(a, "h"), operand(a**2, "h")),
    "proportional": lambda a: Proportional(taylor, 1e-3),
    "length_scaled": lambda a: LengthScaled(jax.nn.relu, jnp.sqrt),
    "top_k": lambda a: TopK(3),
}
over_normalizers = pytest.mark.parametrize("name", NORMALIZERS)


def inputs(q_len=7, k_len=11, heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(q_len), 3)
    shapes = (2, q_len, heads, 5), (2, k_len, kv_heads, 5), (2, k_len, kv_heads, 3)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def stream(
    q, k, v, *, block=(3, 4), normalizer, mask=None, score_mod=None, score=None, forward_mode=True
):
    tile = api.tile_of(q, k, v, mask, score_mod, normalizer, None, score)
    attend = functools.partial(streaming.attend, block_q=block[0], block_k=block[1])
    out, _ = passes.settle(tile, attend, forward_mode=forward_mode)
    return jnp.swapaxes(out, 1, 2)


define = functools.partial(attention, implementation="definition")


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@over_normalizers
def test_streaming_equals_definition(name, x64):
    """Outputs, gradients of inputs, operands and parameters, and a derivative of the gradient."""
    q, k, v = inputs()
    ids = jnp.arange(18) // 5 % 2
    mask = Mask(causal) & Mask(same, (operand(ids[None, :7], "bq"), operand(ids[None, 7:], "bk")))
    parameter, bias = jnp.linspace(0.3, 0.9, 4), jnp.sin(jnp.arange(4 * 7 * 11.0)).reshape(4, 7, 11)

    def everything(attend):
        def out(q, k, v, parameter, bias):
            score_mod = ScoreMod(lambda s, b, h, i, j, x: s + x, (operand(bias, "hqk"),))
            return attend(
                q, k, v, normalizer=NORMALIZERS[name](parameter), mask=mask, score_mod=score_mod
            )

        def slopes(args):
            return jax.grad(lambda *a: jnp.sum(jnp.sin(3 * out(*a))), range(5))(*args)

        args = q, k, v, parameter, bias
        ways = jax.tree.map(lambda x: jnp.cos(3 * x), args)
        return jax.jit(lambda: (out(*args), jax.jvp(slopes, (args,), (ways,))))()

    close(everything(stream), everything(define), 1e-7)


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(sorted(NORMALIZERS)),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_tiles_of_any_size_agree(name, q_len, k_len, block_q, block_k):
    with jax.enable_x64(True):
        args, normalizer = inputs(q_len, k_len), NORMALIZERS[name](jnp.full(4, 0.5))
        got = jax.jit(lambda *a: stream(*a, normalizer=normalizer, block=(block_q, block_k)))(*args)
        close(got, define(*args, normalizer=normalizer), 1e-8)


@over_normalizers
@pytest.mark.parametrize("attend", [stream, define], ids=["xla", "definition"])
def test_rows_without_keys_are_zero_and_pass_no_gradient(name, attend):
    q, k, v = inputs()
    mask = Mask(lambda b, h, q_index, k_index: (k_index < 4) & (q_index % 2 == 0))
    odd = (jnp.arange(7) + 4) % 2 == 1

    def out(q, k, v, a):
        return attend(q, k, v, normalizer=NORMALIZERS[name](a), mask=mask)

    def loss(*args):
        y = out(*args)
        return jnp.sum(jnp.cos(y) + y), y

    args = q, k, v, jnp.full(4, 0.5)
    (_, y), slopes = jax.jit(jax.value_and_grad(loss, range(4), has_aux=True))(*args)
    assert (y[:, odd] == 0).all() and (y[:, ~odd] != 0).any()
    assert all(jnp.isfinite(x).all() for x in slopes)
    dq, dk, dv, _ = slopes
    assert (dq[:, odd] == 0).all() and (dk[:, 4:] == 0).all() and (dv[:, 4:] == 0).all()


@over_normalizers
def test_temporary_memory_is_linear_in_length(name):
    normalizer = NORMALIZERS[name](jnp.full(1, 0.5))

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        loss = jax.grad(
            lambda q, k, v: jnp.sum(attention(q, k, v, normalizer=normalizer)), (0, 1, 2)
        )
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 4.5 * temporaries(4096) < 200e6


def rows_of(scores, normalizer):
    return normalize(jnp.asarray(scores)[None, None], normalizer)[0, 0]


def test_normalizers_are_what_they_say(x64):
    s = jax.random.normal(jax.random.key(0), (6, 9))
    close(rows_of(s, entmax(2.0)).sum(-1), 1)
    assert (rows_of(s, entmax(2.0)) == 0).any()
    close(rows_of(s, entmax(1 + 1e-6)), jax.nn.softmax(s), 1e-4)
    close(rows_of(s, Sinkhorn(1)), jax.nn.softmax(s))
    close(rows_of(s, Sinkhorn(5)).sum(-1), 1)
    close(rows_of(s, Sinkhorn(6)).sum(0), 6 / 9)
    close(rows_of(s, TopK(9)), jax.nn.softmax(s))
    close((rows_of(s, TopK(2)) > 0).sum(-1), 2)
    close(rows_of(s, clipped_softmax(0.0)), jax.nn.softmax(s))
    plain = rows_of(s, Standardized(jnp.ones((1, 1, 1, 1)), jnp.zeros((1, 1, 1, 1)), 0.0))
    close((plain.mean(-1), plain.var(-1)), (jnp.zeros(6), jnp.ones(6)))
    ties = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0]])
    close(rows_of(ties, TopK(2)), jnp.array([[0, 1, 1, 1, 0]]) / 3)


def test_gradient_of_entmax_is_the_published_one(x64):
    """dx = g dp - g sum(g dp) / sum(g), g = p^(2 - alpha) on the support."""
    s, alpha = jax.random.normal(jax.random.key(0), (1, 9)), 1.7
    p, pullback = jax.vjp(lambda s: rows_of(s, entmax(alpha)), s)
    dp = jnp.cos(jnp.arange(9.0))[None]
    g = jnp.where(p > 0, jnp.where(p > 0, p, 1) ** (2 - alpha), 0)
    close(pullback(dp)[0], g * dp - g * (g * dp).sum() / g.sum())


def test_a_root_without_forward_mode_has_the_same_derivatives(x64):
    """Those in reverse mode, of any order, and of the operands."""
    args = *inputs(), jnp.linspace(0.3, 0.9, 4)

    def slopes(**settings):
        def loss(q, k, v, a):
            return jnp.sin(stream(q, k, v, normalizer=entmax(1 + a), **settings)).sum()

        def change(*args):
            return sum((jnp.cos(x) * x).sum() for x in jax.grad(loss, range(4))(*args))

        return jax.jit(lambda *args: (jax.grad(loss, range(4))(*args), jax.grad(change)(*args)))

    close(slopes(forward_mode=False)(*args), slopes()(*args))


def test_stopped_columns_change_the_gradient_alone(x64):
    q, k, v = inputs()

    def slope(stop):
        def loss(q):
            return jnp.sum(jnp.sin(stream(q, k, v, normalizer=Sinkhorn(3, stop))))

        return jax.value_and_grad(loss)(q)

    (value, full), (same_value, partial) = slope(False), slope(True)
    close(value, same_value)
    assert jnp.abs(full - partial).max() > 1e-3


def distance(q, k, q_index, k_index, scales):
    parts = jnp.abs(q[:, :, :, None] - k[:, :, None]) * scales
    return -parts.sum(-1) + 0.1 * (q_index[:, None] - k_index)


@pytest.mark.parametrize("normalizer", [softmax, Sinkhorn(3)], ids=["rows", "columns"])
def test_scores_of_pairs(normalizer, x64):
    """A score with weights, by tiles as narrow as its width asks, with its gradients."""
    q, k, v = inputs()
    q = q.at[..., 0].add(2)
    scales = jnp.linspace(0.5, 1.5, 5)

    def slopes(attend):
        def loss(q, k, v, scales):
            score = Score(distance, (scales,), width=5)
            out = attend(q, k, v, normalizer=normalizer, score=score, mask=Mask(causal))
            return jnp.sum(jnp.sin(3 * out))

        return jax.jit(jax.value_and_grad(loss, range(4)))(q, k, v, scales)

    close(slopes(stream), slopes(define), 1e-8)
    w = attention_weights(q, k, score=Score(distance, (scales,)), normalizer=softmax)
    wide = jnp.repeat(k, 2, 2)
    back = 0.1 * (jnp.arange(7)[:, None] + 4 - jnp.arange(11))
    s = -(jnp.abs(q[:, :, None] - wide[:, None]) * scales).sum(-1).transpose(0, 3, 1, 2) + back
    close(w, jax.nn.softmax(s))
