import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


def qkv(q_len=6, k_len=6, heads=4, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (2, q_len, heads, 3), (2, k_len, kv_heads, 3), (2, k_len, kv_heads, 5)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes))


@pytest.mark.parametrize(("batch", "key_heads"), [(1, 2), (2, 4)])
def test_factors_are_the_bias_of_their_product(batch, key_heads):
    q, k, v = qkv(5, 6)
    of_q = jax.random.normal(jax.random.key(1), (batch, 5, 4, 2))
    of_k = jax.random.normal(jax.random.key(2), (batch, 6, key_heads, 2))
    bias = jnp.einsum("bthr,bshr->bhts", of_q, jnp.repeat(of_k, 4 // key_heads, 2))
    for part in {"causal": True}, {"scale": 0.3, "mask": jnp.arange(6) != 2}:
        got = ops.factorized_bias_attention(q, k, v, of_q, of_k, **part)
        close(got, ops.dot_product_attention(q, k, v, bias=bias, **part))


def test_linear_biases_by_factors():
    q, k, v = qkv()
    got = ops.factorized_bias_attention(q, k, v, *ops.alibi_bias_factors(4, 6, 6), causal=True)
    close(got, ops.dot_product_attention(q, k, v, bias=ops.alibi_bias(4, 6, 6), causal=True))


def test_factor_makers():
    x, y = (jax.random.normal(jax.random.key(n), (2, 4 + n, 3)) for n in (0, 1))
    alpha = jnp.array([0.5, 2.0])
    of_q, of_k = ops.squared_distance_bias_factors(x, y, alpha)
    distance = jnp.sum((x[:, :, None] - y[:, None]) ** 2, -1)[:, None]
    close(jnp.einsum("bthr,bshr->bhts", of_q, of_k), -alpha[:, None, None] * distance, atol=1e-5)
    bias = jax.random.normal(jax.random.key(2), (1, 2, 4, 5))
    errors = []
    for rank in range(1, 5):
        of_q, of_k = ops.svd_bias_factors(bias, rank)
        assert of_q.shape == (1, 4, 2, rank) and of_k.shape == (1, 5, 2, rank)
        errors.append(jnp.linalg.norm(jnp.einsum("bthr,bshr->bhts", of_q, of_k) - bias))
    tail = jnp.sqrt(jnp.sum(jnp.linalg.svdvals(bias)[..., 1:] ** 2))
    assert errors[0] > errors[1] > errors[2] > 10 * errors[3] < 1e-4
    close(errors[0], tail)


def test_existence_is_a_bias_and_sure_ends_cut():
    q, k, v = qkv()
    chances = jnp.cumprod(jax.random.uniform(jax.random.key(3), (2, 6)), 1)
    got = ops.existence_attention(q, k, v, chances)
    bias = ops.existence_bias(chances)
    close(got, ops.dot_product_attention(q, k, v, bias=bias))
    assert (jnp.tril(bias) == 0).all() and (bias <= 0).all()
    plain = ops.dot_product_attention(q[:, :4], k[:, :4], v[:, :4])
    got = ops.existence_attention(q, k, v, jnp.broadcast_to(jnp.arange(6) < 4, (2, 6)) * 1.0)
    close(got[:, :4], plain)
    assert (got[:, 4:] == 0).all()
    close(
        ops.existence_attention(q, k, v, jnp.full((2, 6), 0.3)), ops.dot_product_attention(*qkv())
    )


def test_no_gradient_is_nan_where_nothing_exists():
    slopes = jax.grad(lambda e: jnp.sum(jnp.sin(ops.existence_attention(*qkv(), e))))(
        jnp.array([[1.0, 0.5, 0.0, 0.2, 0.0, 0.0], [0.0] * 6])
    )
    assert jnp.isfinite(slopes).all() and (slopes[0, [1, 3]] != 0).all() and (slopes[1] == 0).all()


def test_gates_choose_between_content_and_place():
    q, k, v = qkv(9, 9)
    scores = jax.random.normal(jax.random.key(4), (4, 9, 9))
    got = ops.gated_positional_attention(q, k, v, scores, jnp.array([-99.0, 99.0, 0.0, 99.0]))
    content = ops.dot_product_attention(q, k, v)
    place = jnp.einsum("hts,bshd->bthd", jax.nn.softmax(scores), jnp.repeat(v, 2, 2))
    close(got[:, :, 0], content[:, :, 0])
    close(got[:, :, [1, 3]], place[:, :, [1, 3]])
    close(got[:, :, 2], (content + place)[:, :, 2] / 2)


def test_quadratic_scores_copy_the_pixel_at_an_offset():
    """With nine heads and large weights, head p = h1 + 3 h2 reads offset (h2 - 1, h1 - 1)."""
    h2, h1 = np.divmod(np.arange(9), 3)
    weights = 60.0 * jnp.array([2 * (h2 - 1), 2 * (h1 - 1), -np.ones(9)])
    scores = ops.quadratic_position_scores(weights, jnp.zeros(9), shape=(4, 5))
    image = jax.random.normal(jax.random.key(0), (1, 20, 9, 2))
    zeros = jnp.zeros_like(image)
    got = ops.gated_positional_attention(zeros, zeros, image, scores, jnp.full(9, 99.0))
    got, image = (x.reshape(4, 5, 9, 2) for x in (got, image))
    for p in range(9):
        want = image[h1[p] : h1[p] + 2, h2[p] : h2[p] + 3, p]
        close(got[1:3, 1:4, p], want)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: ops.factorized_bias_attention(*x, x[0][:, 1:], x[1]),
            r"bias_q must be \[2 or 1, 6, 4, R\]",
        ),
        (lambda x: ops.factorized_bias_attention(*x, x[0], x[2]), "bias_k must be"),
        (lambda x: ops.svd_bias_factors(jnp.ones((1, 2, 4, 5)), 5), "within 1 and 4, got 5"),
        (lambda x: ops.existence_attention(*x, jnp.ones((2, 5))), r"existence must be \[2, 6\]"),
        (
            lambda x: ops.gated_positional_attention(*x, jnp.ones((4, 6, 6)), jnp.ones(2)),
            r"gate \[4\]",
        ),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call(qkv())
