import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
SLOPE = jnp.array([0.0, 0.5, -0.2, 1.0])


def qkv(q_len=6, k_len=6, heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, q_len, heads, 3), (2, k_len, kv_heads, 3), (2, k_len, kv_heads, 5)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


def test_cosines_do_not_see_lengths_and_match_rms_norm():
    q, k, v = qkv()
    g = jnp.array([1.0, 2.0, 3.0, 4.0])
    bias = jax.random.normal(jax.random.key(1), (4, 6, 6))
    want = ops.qk_norm_attention(q, k, v, g, bias=bias, causal=True)
    lengths = jnp.exp(jax.random.normal(jax.random.key(2), (2, 6, 1, 1)))
    close(ops.qk_norm_attention(q * lengths, k / lengths, v, g, bias=bias, causal=True), want)
    rms = [x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True)) for x in (q, k)]
    close(ops.qk_norm_attention(q, k, v, 3**0.5), ops.dot_product_attention(*rms, v))
    slopes = jax.grad(lambda q: jnp.sum(ops.qk_norm_attention(q, k, v, g)))(jnp.zeros_like(q))
    assert jnp.isfinite(slopes).all()


def test_temperatures_are_inverse_and_of_values():
    q, k, v = qkv()
    ones = jnp.ones((2, 6, 4)), jnp.ones((2, 6, 2))
    plain = ops.dot_product_attention(q, k, v, causal=True)
    close(ops.selective_attention(q, k, v, causal=True), plain)
    close(ops.selective_attention(q, k, v, *ones, causal=True), plain)
    tau_q, tau_v = (jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(ones))
    want = ops.dot_product_attention(q * tau_q[..., None], k, v * tau_v[..., None], causal=True)
    close(ops.selective_attention(q, k, v, tau_q, tau_v, causal=True), want)
    mean = jnp.broadcast_to(jnp.repeat(v, 2, 2).mean(1, keepdims=True), (2, 6, 4, 5))
    close(ops.selective_attention(q, k, v, jnp.zeros_like(tau_q)), mean)


def test_temperatures_of_positions():
    tau = ops.position_temperature(jnp.array([-99.0, 0.0, 99.0]), 4)
    close(tau, 1 + jnp.array([0, 0.5, 1]) * jnp.log(jnp.array([1.0, 2, 3, 4]))[:, None])


@pytest.mark.parametrize("mode", ["log", "log_base", "learned"])
@pytest.mark.parametrize(
    "part",
    [
        {"causal": True},
        {},
        {"mask": jax.random.bernoulli(jax.random.key(5), 0.5, (2, 1, 5, 7)), "causal": True},
        {"mask": jax.random.bernoulli(jax.random.key(5), 0.5, (4, 5, 7))},
        {"mask": ops.sliding_window_mask(1, 1)},
    ],
    ids=["causal", "full", "batch", "heads", "window"],
)
def test_scores_scale_with_the_number_of_visible_keys(mode, part):
    q, k, v = qkv(5, 7)
    allowed = ops.as_mask(part.get("mask"), part.get("causal", False))
    n = jnp.full((5,), 7) if allowed is None else allowed.dense(5, 7).sum(-1)
    n = jnp.broadcast_to(n[:, None] if n.ndim == 3 else n, (2, 4, 5)) if n.ndim < 3 else n
    logs = jnp.swapaxes(jnp.broadcast_to(jnp.log(jnp.maximum(n, 1)), (2, 4, 5)), 1, 2)
    factor = {"log": logs, "log_base": logs / math.log(9), "learned": 1 + SLOPE * logs}[mode]
    want = ops.dot_product_attention(q * factor[..., None], k, v, **part)
    given = {"log": {}, "log_base": {"base_length": 9}, "learned": {"slope": SLOPE}}[mode]
    close(ops.length_scaled_attention(q, k, v, mode=mode, **given, **part), want)


@pytest.mark.parametrize("causal", [False, True])
def test_pooling_is_attention_with_scores_of_keys(causal):
    """Also with scores of +-10^3, where sums of exponentials overflow."""
    q, k, v = qkv(40, 40)
    for size in 1.0, 1e3:
        scores = jnp.sum(jax.nn.silu(size * q) * jnp.repeat(k, 2, 2), -1) / 3**0.5
        ones = jnp.ones((2, 40, 4, 1))
        want = ops.dot_product_attention(ones, scores[..., None], v, causal=causal, scale=1.0)
        got = ops.self_gated_pooling(size * q, k, v, causal=causal)
        close(got, want, rtol=1e-3, atol=1e-3 if size > 1 else 1e-5)


def test_history_that_is_not_valid_is_not_read():
    arrays = [jax.random.normal(jax.random.key(n), x) for n, x in enumerate([(2, 4), (2, 5, 4)])]
    target, history = arrays
    mask = jnp.array([[True] * 3 + [False] * 2, [False] * 5])
    pooled, crossed = ops.decoupled_target_attention(target, history, target, history, mask)
    short = history[:1, :3]
    want, _ = ops.decoupled_target_attention(target[:1], short, target[:1], short)
    close(pooled[:1], want)
    close(crossed, target * pooled)
    assert (pooled[1] == 0).all()


def test_score_functions_agree_where_they_meet():
    q, k = (jax.random.normal(jax.random.key(n), (2, 3 + n, 4)) for n in (0, 1))
    eye = jnp.eye(4)
    close(ops.luong_scores(q, k, method="general", w=eye), ops.luong_scores(q, k))
    v = jnp.arange(4.0)
    joint = ops.luong_scores(q, k, method="concat", w=jnp.concatenate([eye, eye]), v=v)
    parts = ops.additive_scores(q[:, :, None], k[:, :, None], v[None], jnp.array([2.0]))
    close(joint + 2, parts[:, 0])
    place = ops.luong_scores(q, k, method="location", w=jnp.eye(4, 9))
    close(place, q)


def test_alignments_move_forward():
    p = jax.random.uniform(jax.random.key(0), (3, 4, 6))
    a = ops.monotonic_alignment(p)
    last = np.eye(6)[[0] * 3]
    for t in range(4):
        want = np.zeros((3, 6))
        for j in range(6):
            for i in range(j + 1):
                want[:, j] += p[:, t, j] * last[:, i] * np.prod(1 - p[:, t, i:j], 1)
        close(a[:, t], want)
        last = want
    sure = ops.monotonic_alignment(jnp.eye(6)[jnp.array([1, 1, 4, 2])])
    assert sure.argmax(-1)[:3].tolist() == [1, 1, 4] and sure.sum(-1).tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: ops.qk_norm_attention(*x, jnp.ones(3)), r"g must be a number or \[4\]"),
        (lambda x: ops.selective_attention(*x, jnp.ones((2, 6, 2))), r"q_temperature must be \[2"),
        (lambda x: ops.selective_attention(*x, None, jnp.ones((2, 6))), "v_temperature must be"),
        (lambda x: ops.length_scaled_attention(*x, mode="ln"), "mode must be 'log'"),
        (lambda x: ops.length_scaled_attention(*x, mode="log_base", base_length=1), "above 1"),
        (lambda x: ops.length_scaled_attention(*x, mode="learned"), "needs slope"),
        (lambda x: ops.self_gated_pooling(x[0][:, 1:], *x[1:]), "need the length and heads of q"),
        (lambda x: ops.luong_scores(x[0], x[1], method="mlp"), "method must be dot"),
        (lambda x: ops.luong_scores(x[0], x[1], method="concat"), "'concat' needs w, and v"),
        (lambda x: ops.luong_scores(*x[:2], method="location", w=jnp.ones((3, 5))), "6 keys"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(qkv())
