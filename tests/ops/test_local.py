import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab.ops import (
    block_local_mask,
    causal_mask,
    dot_product_attention,
    gaussian_local_attention,
    local_shuffle,
    neighborhood_attention,
    neighborhood_mask,
    segment_mask,
    soft_causal_attention,
    subsampled_attention,
)


def arrays(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_neighborhood_is_attention_with_its_mask():
    shape, settings = (3, 8), dict(kernel=(2, 3), dilation=(1, 2), causal=(True, False))
    q, k, v, ek, ev = arrays(
        *[(2, *shape, 4, 6), (2, *shape, 2, 6), (2, *shape, 2, 5)], (2, 3, 2, 6), (2, 3, 2, 5)
    )
    flat = [x.reshape(2, 24, *x.shape[-2:]) for x in (q, k, v)]
    mask = neighborhood_mask(shape, **settings)
    got = neighborhood_attention(q, k, v, **settings)
    assert got.shape == (2, *shape, 4, 5)
    close(got.reshape(2, 24, 4, 5), dot_product_attention(*flat, mask=mask))
    got = neighborhood_attention(q, k, v, extra_k=ek, extra_v=ev, scale=0.7, **settings)
    both = [jnp.concatenate(pair, 1) for pair in ((ek, flat[1]), (ev, flat[2]))]
    wide = jnp.pad(mask.dense(24, 24), ((0, 0), (3, 0)), constant_values=True)
    want = dot_product_attention(flat[0], *both, mask=wide, scale=0.7)
    close(got.reshape(2, 24, 4, 5), want)


@pytest.mark.parametrize("implementation", ["definition", "xla"])
def test_a_table_adds_the_bias_of_the_distance(implementation):
    shape, kernel, dilation = (4, 6), (3, 3), (1, 2)
    q, k, v, table = arrays(*[(1, *shape, 2, 4)] * 3, (2, 5, 5))
    index = np.stack(np.unravel_index(np.arange(24), shape), -1) // dilation
    apart = np.clip(index[None] - index[:, None], -2, 2) + 2
    bias = table[:, apart[..., 0], apart[..., 1]]
    flat = [x.reshape(1, 24, 2, 4) for x in (q, k, v)]
    mask = neighborhood_mask(shape, kernel, dilation=dilation)
    want = dot_product_attention(*flat, bias=bias, mask=mask)
    settings = dict(kernel=kernel, dilation=dilation, implementation=implementation)
    got = neighborhood_attention(q, k, v, bias_table=table, **settings)
    close(got.reshape(want.shape), want)


@pytest.mark.parametrize("more", ["extra", "table"])
def test_tiles_change_nothing_but_the_order(more):
    shape, kernel = (4, 6, 2), (3, 4, 2)
    q, k, v, ek, ev, table = arrays(
        *[(2, *shape, 4, 6), (2, *shape, 2, 6), (2, *shape, 2, 5)],
        *[(2, 3, 2, 6), (2, 3, 2, 5), (4, 5, 7, 3)],
    )
    settings = dict(bias_table=table)
    if more == "extra":
        settings = dict(extra_k=ek, extra_v=ev, stride=(2, 1, 1), causal=(False, True, False))

    @functools.partial(jax.jit, static_argnums=1)
    def both(k, tile):
        def call(k):
            return neighborhood_attention(q, k, v, kernel=kernel, tile=tile, **settings)

        out, pull = jax.vjp(call, k)
        return out, *pull(out)

    for got, want in zip(both(k, (2, 3, 1)), both(k, None)):
        close(got, want)


def test_a_table_needs_no_square_array():
    """Compiled memory of the gradient with a table grows with T, not with T^2."""

    def temporaries(length):
        x = jax.ShapeDtypeStruct((1, length, 1, 4), jnp.float32)
        table = jax.ShapeDtypeStruct((1, 9), jnp.float32)

        def loss(q, table):
            return neighborhood_attention(q, q, q, kernel=5, bias_table=table).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.5 * temporaries(4096)


def test_one_group_is_dense_and_the_plain_order_is_blocks():
    q, k, v = arrays((2, 12, 4, 4), (2, 12, 2, 4), (2, 12, 2, 3))
    order = jnp.stack([local_shuffle(jax.random.key(n), 12, jnp.inf) for n in range(2)])
    close(subsampled_attention(q, k, v, order, 1), dot_product_attention(q, k, v))
    blocks = dot_product_attention(q, k, v, mask=block_local_mask(12, 4))
    close(subsampled_attention(q, k, v, jnp.arange(12), 3), blocks)
    groups = segment_mask(jnp.argsort(order, 1) // 3)
    for causal in (False, True):
        want = dot_product_attention(q, k, v, mask=groups, causal=causal)
        close(subsampled_attention(q, k, v, order, 4, causal=causal), want)


def test_a_narrow_shuffle_keeps_tokens_near():
    order = np.asarray(local_shuffle(jax.random.key(0), 1000, 20.0))
    assert sorted(order) == list(range(1000)) and (order != np.arange(1000)).any()
    assert np.abs(order - np.arange(1000)).max() <= 20
    assert (local_shuffle(jax.random.key(0), 9, 0.0) == jnp.arange(9)).all()
    far = np.asarray(local_shuffle(jax.random.key(0), 1000, float("inf")))
    assert sorted(far) == list(range(1000)) and np.abs(far - np.arange(1000)).max() > 500


def test_gaussian_weights_pair_by_pair():
    q, k, v = arrays((1, 5, 2, 4), (1, 9, 2, 4), (1, 9, 2, 3))
    center = jnp.asarray(np.random.default_rng(1).uniform(0, 8, (1, 5, 2)))
    away = np.arange(9) - np.asarray(center).transpose(0, 2, 1)[..., None]
    scores = 0.5 * np.einsum("bthd,bshd->bhts", q, k)
    weights = np.where(np.abs(away) <= 2.5, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    weights *= np.exp(-(away**2) / (2 * 1.25**2))
    want = np.einsum("bhts,bshd->bthd", weights, v)
    for implementation in ("definition", "xla"):
        run = dict(implementation=implementation)
        close(gaussian_local_attention(q, k, v, center, 2.5, 0.5, **run), want)


def test_wide_gaussians_are_plain_and_far_ones_nothing():
    q, k, v = arrays(*[(1, 6, 1, 4)] * 3)
    near, far = jnp.full((1, 6, 1), 3.0), jnp.full((1, 6, 1), -50.0)
    got = gaussian_local_attention(q, k, v, near, 1e6, 0.5)
    close(got, dot_product_attention(q, k, v))
    out, pullback = jax.vjp(lambda *x: gaussian_local_attention(*x, 3.0), q, k, v, far)
    assert (out == 0).all() and all((x == 0).all() for x in pullback(out + 1))


def test_soft_causal_weights():
    q, k, v = arrays((2, 5, 2, 4), (2, 7, 1, 4), (2, 7, 1, 4))
    close(soft_causal_attention(q, k, v, 1.0), dot_product_attention(q, k, v))
    _, weights = dot_product_attention(q, k, v, return_weights=True)
    soft = jnp.where(causal_mask().dense(5, 7), weights, 0.3 * weights)
    want = jnp.einsum("bhts,bshd->bthd", soft, jnp.repeat(v, 2, 2))
    close(soft_causal_attention(q, k, v, 0.3), want)


def test_soft_causal_rows_before_all_keys_keep_their_gradients_finite():
    q, k, v = arrays((1, 6, 1, 4), (1, 3, 1, 4), (1, 3, 1, 4))
    out = soft_causal_attention(q, k, v, 0.0)
    assert (out[:, :3] == 0).all() and (out[:, 3:] != 0).all()
    grads = jax.grad(lambda *x: soft_causal_attention(*x).sum(), (0, 1, 2, 3))(q, k, v, 0.5)
    assert all(jnp.isfinite(x).all() for x in grads)


def test_errors():
    (x,) = arrays((1, 6, 2, 4))
    cases = {
        "q, k, v must be": lambda: neighborhood_attention(x, x[:, :5], x, kernel=3),
        "given together": lambda: neighborhood_attention(x, x, x, kernel=3, extra_k=x),
        "bias_table must be": lambda: neighborhood_attention(
            x, x, x, kernel=3, bias_table=jnp.zeros((2, 4))
        ),
        "bias_table needs stride 1": lambda: neighborhood_attention(
            x, x, x, kernel=3, stride=2, bias_table=jnp.zeros((2, 5))
        ),
        "num_groups must divide": lambda: subsampled_attention(x, x, x, jnp.arange(6), 4),
        "order must be": lambda: subsampled_attention(x, x, x, jnp.arange(5), 3),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
