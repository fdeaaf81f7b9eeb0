import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@functools.partial(jax.jit, static_argnames=("causal", "return_state"))
def latte(q, k, v, causal=True, **options):
    return ops.latte_attention(q, k, v, causal=causal, **options)


@jax.jit
def packed(q, k, v, segment_ids=None):
    return ops.causal_latte_attention(q, k, v, segment_ids=segment_ids)


def logits(length=6, heads=4, key_heads=2, latents=3):
    """With values that make outputs the weights themselves."""
    v = jnp.broadcast_to(jnp.eye(length)[None, :, None], (2, length, key_heads, length))
    return normal(0, 2, length, heads, latents), normal(1, 2, length, key_heads, latents), v


@jax.jit
def direct(q, k, v):
    """Causal weights by an explicit softmax over the past of every position."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], 2) for x in (k, v))
    rows = [
        jnp.einsum(
            "bhl,bshl,bshd->bhd",
            jax.nn.softmax(q[:, t]),
            jax.nn.softmax(k[:, : t + 1], 1),
            v[:, : t + 1],
        )
        for t in range(q.shape[1])
    ]
    return jnp.stack(rows, 1)


def test_latte_normalises_every_latent_over_the_past(x64):
    q, k, v = logits()
    got = latte(q, k, v)
    close(got, direct(q, k, v))
    close(got.sum(-1), jnp.ones((2, 6, 4)))
    close(latte(q, k + normal(2, 2, 1, 2, 3), v), got)
    pooled = latte(q[..., :1], k[..., :1], v)
    close(pooled[:, -1, ::2], jnp.swapaxes(jax.nn.softmax(k[..., 0], 1), 1, 2))


def test_bidirectional_latte_is_efficient_attention_and_the_last_causal_row(x64):
    q, k, v = logits()
    got = latte(q, k, v, causal=False)
    close(got, ops.efficient_attention(q, k, v))
    close(got[:, -1], latte(q, k, v)[:, -1])


def test_masked_positions_are_not_read(x64):
    q, k, v = logits()
    mask = jnp.array([[0, 0, 1, 1, 0, 1], [0] * 6], bool)
    k = jnp.where(mask[..., None, None], k, 1e3)  # a maximum over them would drown the others

    got = latte(q, k, v, mask=mask)
    assert (got[0, :2] == 0).all() and (got[1] == 0).all()
    kept = jnp.array([2, 3, 5])
    close(got[:1, kept], direct(q[:1, kept], k[:1, kept], v[:1, kept]))
    close(got[0, 4], latte(q[:1, 4:5], k[:1, kept[:2]], v[:1, kept[:2]], causal=False)[0, 0])
    loss = lambda k, v: (latte(q, k, v, mask=mask) ** 2).sum()  # noqa: E731
    for slope in jax.jit(jax.grad(loss, (0, 1)))(k, v):
        assert jnp.isfinite(slope).all() and (slope[:, ~mask[0]] == 0).all()
        assert (slope[0, 3] != 0).any()


def test_latte_states_are_sums_in_units_of_the_largest_logit(x64):
    q, k, v = logits(heads=2)
    _, (sums, total, peak) = latte(q, k, v, return_state=True)
    close(peak, k.max(1))
    weights = jnp.exp(k - peak[:, None])
    close(total, weights.sum(1))
    close(sums, jnp.einsum("bshl,bshd->bhld", weights, v))


def test_latte_keeps_segments_and_padding_apart(x64):
    q, k, v = logits(8)
    ids = jnp.array([[-1, 0, 0, 0, 1, 1, 1, -1]] * 2)
    k = k.at[:, 1:4].add(500.0).at[:, 7].add(900.0)  # what is forgotten is in far larger units
    got, state = packed(q, k, v, ids)
    assert (got[:, 0] == 0).all() and (got[:, 7] == 0).all()
    for span in slice(1, 4), slice(4, 7):
        alone, end = packed(q[:, span], k[:, span], v[:, span])
        close(got[:, span], alone)
    jax.tree.map(close, state, end)
    loss = lambda k: (packed(q, k, v, ids)[0] ** 2).sum()  # noqa: E731
    assert jnp.isfinite(jax.jit(jax.grad(loss))(k)).all()


def test_latte_stands_logits_of_any_size():
    q, k, v = logits()
    run = jax.jit(jax.value_and_grad(lambda k: (latte(q, k, v) ** 2).sum()))
    for steps in (jnp.arange(6.0), -jnp.arange(6.0), jnp.array([0, 1, 0, -1, 1, 0.0])):
        large = k + 1e4 * steps[:, None, None]
        got, slopes = run(large)
        assert jnp.isfinite(slopes).all()
        close(got, (direct(q, large, v) ** 2).sum(), 1e-5)


def test_latte_says_what_needs_causality():
    q, k, v = logits()
    with pytest.raises(ValueError, match="need causal=True"):
        ops.latte_attention(q, k, v, return_state=True)
    with pytest.raises(ValueError, match="mask must be bool"):
        ops.latte_attention(q, k, v, causal=True, mask=jnp.ones((2, 5), bool))


linformer = jax.jit(ops.linformer_attention, static_argnames="scale")
dot_product = jax.jit(ops.dot_product_attention)


def test_linformer_with_rows_of_the_identity_is_attention_to_chosen_tokens(x64):
    q, k, v = normal(0, 2, 4, 4, 3), normal(1, 2, 6, 2, 3), normal(2, 2, 6, 2, 5)
    eye = jnp.eye(6)
    want = dot_product(q, k, v)
    close(linformer(q, k, v, eye, eye), want)
    chosen = jnp.array([4, 1])
    want = dot_product(q, k[:, chosen], v[:, chosen])
    close(linformer(q, k, v, eye[chosen], eye[chosen]), want)


def test_linformer_projects_heads_apart_and_uses_the_first_columns(x64):
    q, k, v = normal(0, 2, 4, 4, 3), normal(1, 2, 6, 2, 3), normal(2, 2, 6, 2, 5)
    keys, values = normal(3, 4, 3, 9), normal(4, 3, 9)
    got = linformer(q, k, v, keys, values, scale=0.7)
    for head in 0, 3:
        one = [x[:, :, n : n + 1] for x, n in ((q, head), (k, head // 2), (v, head // 2))]
        want = linformer(*one, keys[head, :, :6], values[:, :6], scale=0.7)
        close(got[:, :, head : head + 1], want)
    with pytest.raises(ValueError, match="proj_v must be"):
        linformer(q, k, v, keys, values[:, :5])
