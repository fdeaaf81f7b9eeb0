import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


log_normal = jax.jit(ops.linear_log_normal_attention, static_argnames=("causal", "eps"))
causal_log_normal = jax.jit(ops.causal_log_normal_attention, static_argnames="eps")
fastmax = jax.jit(ops.fastmax_attention, static_argnames=("order", "causal", "normalize", "limit"))


def qkv(q_len=5, k_len=5, heads=2, dim=4):
    """With values that make outputs the weights themselves."""
    v = jnp.broadcast_to(jnp.eye(k_len)[None, :, None], (2, k_len, heads, k_len))
    return normal(0, 2, q_len, heads, dim), normal(1, 2, k_len, heads, dim), v


def test_simplified_attention_is_linear_attention_plus_a_convolution(x64):
    q, k, v = normal(0, 2, 6, 4, 3), normal(1, 2, 6, 2, 3), normal(2, 2, 6, 2, 3)
    kernel, bias = normal(3, 5, 3, 3), normal(4, 3)
    run = jax.jit(functools.partial(ops.simplified_linear_attention, height=2, width=3))
    plain = run(q, k, v, 0 * kernel, 0 * bias)
    close(plain, jax.jit(lambda *x: ops.linear_attention(*x, feature_map="relu"))(q, k, v))
    image = np.pad(np.asarray(v).reshape(2, 2, 3, 2, 3), ((0, 0), (2, 2), (1, 1), (0, 0), (0, 0)))
    local = sum(kernel[y, x] * image[:, y : y + 2, x : x + 3] for y in range(5) for x in range(3))
    want = np.repeat(np.asarray(local + bias).reshape(2, 6, 2, 3), 2, axis=2)
    close(run(q, k, v, kernel, bias) - plain, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 3}, "must have 3 \\* 3 positions"),
        ({"conv_kernel": (5, 5, 2)}, "conv_kernel must be"),
        ({"conv_kernel": (4, 5, 3)}, "odd sizes"),
        ({"conv_bias": (2,)}, "conv_bias"),
    ],
)
def test_simplified_attention_names_what_does_not_fit(change, message):
    given = dict(conv_kernel=(5, 5, 3), conv_bias=(3,), height=2, width=3) | change
    arrays = {n: jnp.zeros(x) if isinstance(x, tuple) else x for n, x in given.items()}
    x = jnp.zeros((1, 6, 1, 3))
    with pytest.raises(ValueError, match=message):
        ops.simplified_linear_attention(x, x, x, **arrays)


def test_log_normal_weights_are_convex_and_do_not_see_shifts(x64):
    q, k, v = qkv(4, 6)
    run = lambda q, k: log_normal(  # noqa: E731
        q, k, v, alpha=1.5, beta=0.7, eps=0.0
    )
    weights = run(q, k)
    assert (weights > 0).all()
    close(weights.sum(-1), jnp.ones((2, 4, 2)))
    close(run(q + normal(2, 2, 4, 2, 1), k + normal(3, 2, 1, 2, 1)), weights)
    uniform = log_normal(q, k, v, alpha=0.0, beta=0.0)
    close(uniform, jnp.full_like(uniform, 1 / 6), 1e-7)


def test_log_normal_temperatures_are_constants_of_the_whole_arrays(x64):
    q, k, v = qkv()
    alpha, beta = ops.log_normal_temperatures(jnp.std(q, ddof=1), jnp.std(k, ddof=1))
    run = lambda **given: jax.jit(  # noqa: E731
        jax.value_and_grad(lambda q, k: (log_normal(q, k, v, **given) ** 2).sum(), (0, 1))
    )(q, k)
    jax.tree.map(close, run(), run(alpha=alpha, beta=beta))
    spread = alpha * jnp.std(q, ddof=1), beta * jnp.std(k, ddof=1)
    close(spread[0], spread[1])
    same = log_normal(0 * q, 0 * k, v)
    close(same, jnp.full_like(same, 1 / 5), 1e-7)


def test_causal_log_normal_attention_is_that_of_every_prefix(x64):
    q, k, v = qkv()
    at = dict(alpha=2.0, beta=1.5, eps=0.0)
    got, _ = causal_log_normal(q, k, v, **at)
    close(got, log_normal(q, k, v, causal=True, **at))
    want = log_normal(q[:, 2:3], k[:, :3], v[:, :3], **at)
    close(got[:, 2:3], want)


def test_causal_log_normal_attention_goes_on_and_keeps_segments_apart(x64):
    q, k, v = normal(0, 2, 7, 4, 3), 9 * normal(1, 2, 7, 2, 3), normal(2, 2, 7, 2, 5)
    run = lambda span, **given: causal_log_normal(  # noqa: E731
        q[:, span], k[:, span], v[:, span], alpha=2.0, beta=1.5, **given
    )
    whole, end = run(slice(0, 7))
    first, state = run(slice(0, 4))
    second, state = run(slice(4, 7), initial_state=state)
    close(jnp.concatenate([first, second], 1), whole)
    jax.tree.map(close, state, end)
    packed, _ = run(slice(0, 7), segment_ids=jnp.array([[0, 0, -1, 1, 1, 1, 1]] * 2))
    close(packed[:, :2], first[:, :2])
    close(packed[:, 3:], run(slice(3, 7))[0])
    assert (packed[:, 2] == 0).all()


def test_causal_log_normal_attention_resolves_what_a_later_key_dwarfs():
    q, k, v = qkv()
    k = k.at[:, 3:].add(1e4)
    at = dict(alpha=1.0, beta=1.0)
    out, _ = causal_log_normal(q, k, v, **at)
    want = log_normal(q[:, :3], k[:, :3], v[:, :3], causal=True, **at)
    close(out[:, :3], want, 1e-5)
    lost = log_normal(q, k, v, causal=True, **at)
    assert (lost[:, :3] == 0).all()


def test_log_normal_diag_attention_over_one_block_is_half_softmax(x64):
    q, k, v = qkv()
    got = jax.jit(functools.partial(ops.linear_log_normal_diag_attention, block_size=5))(q, k, v)
    near = jax.jit(ops.dot_product_attention)(q, k, v)
    close(got, (log_normal(q, k, v) + near) / 2)


@settings(max_examples=4, deadline=None)
@given(dim=st.integers(1, 4), order=st.integers(0, 4))
def test_polynomial_features_multiply_to_the_taylor_polynomial(dim, order):
    with jax.enable_x64(True):
        x, y = (np.asarray(normal(n, 3, dim), np.float64) for n in range(2))
        got = ops.polynomial_feature_map(x, order=order), ops.polynomial_feature_map(y, order=order)
        assert got[0].shape == (3, math.comb(dim + order, order))
        dot = (x * y).sum(-1)
        want = sum(dot**n / math.factorial(n) for n in range(order + 1))
        close((got[0] * got[1]).sum(-1), want)


@pytest.mark.parametrize("causal", [False, True])
def test_fastmax_weights_are_normalised_polynomials_of_scores(x64, causal):
    q, k, v = qkv()
    scores = jnp.einsum("bthd,bshd->bths", q, k)
    raw = 1 + scores + scores**2 / 2
    raw = raw * (jnp.tril(jnp.ones((5, 5)))[:, None] if causal else 1)
    got = fastmax(q, k, v, causal=causal, normalize="none")
    close(got, raw / raw.sum(-1, keepdims=True))
    assert (raw[:, -1] >= 0.5).all()
    mean = fastmax(q, k, v, order=0, causal=causal, normalize="none")
    counts = jnp.arange(1, 6) if causal else jnp.full(5, 5)
    close(mean.max(-1), jnp.broadcast_to(1 / counts[:, None], (2, 5, 2)))


def test_fastmax_of_a_high_order_is_softmax(x64):
    q, k, v = qkv(dim=2)
    got = fastmax(q / 2, k, v, order=16, normalize="none")
    close(got, ops.dot_product_attention(q, k, v, scale=0.5), 1e-6)


def test_fastmax_normalises_first(x64):
    q, k, v = qkv()
    standard = fastmax(3 * q + 1, k, v)
    close(standard, fastmax(q, k, v))
    close(ops.standardize(q).std(-1), jnp.ones((2, 5, 2)))
    largest = fastmax(3 * q, k, v, normalize="max", limit=0.5)
    longest = lambda x: jnp.sqrt((x**2).sum(-1, keepdims=True)).max(1, keepdims=True)  # noqa: E731
    short = 0.5 * q / longest(q), 0.5 * k / longest(k)
    close(largest, fastmax(*short, v, normalize="none"))


@pytest.mark.parametrize("normalize", ["standardize", "max"])
def test_fastmax_of_equal_channels_has_finite_gradients(normalize):
    q, k, v = qkv()
    loss = lambda q, k: (fastmax(q, k, v, normalize=normalize) ** 2).sum()  # noqa: E731
    for slope in jax.jit(jax.grad(loss, (0, 1)))(0 * q, 0 * k):
        assert jnp.isfinite(slope).all()


def test_fastmax_names_what_is_unknown():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="normalize must be one of standardize, max, none"):
        fastmax(q, k, v, normalize="mean")
    with pytest.raises(ValueError, match="order must be at least 0"):
        fastmax(q, k, v, order=-1)
