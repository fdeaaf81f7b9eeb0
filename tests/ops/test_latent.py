import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

qk = jax.jit(ops.compressed_convolutional_qk)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def latents(length=7):
    shapes = [(2, 5, 4, 6), (2, 5, 4, 2), (2, length, 3), (2, length, 2), (3, 4, 6), (3, 4, 5)]
    return tuple(normal(n, *shape) for n, shape in enumerate(shapes))


def test_the_absorbed_form_is_the_same_with_its_gradients(x64):
    """With a mask that leaves one row nothing."""
    mask = jnp.ones((5, 7), bool).at[1].set(False)

    def run(absorb):
        def loss(*arrays):
            out = ops.latent_attention(*arrays, mask=mask, causal=True, absorb=absorb)
            return jnp.sin(out).sum(), out

        return jax.jit(jax.grad(loss, tuple(range(6)), has_aux=True))(*latents())

    (grads, out), (other, same) = run(False), run(True)
    jax.tree.map(close, (grads, out), (other, same))
    assert (out[:, 1] == 0).all() and (grads[0][:, 1] == 0).all()


def test_latent_attention_is_attention_with_keys_of_low_rank(x64):
    q_nope, q_rope, latent, k_rope, w_uk, w_uv = latents()
    k = jnp.einsum("bsc,chd->bshd", latent, w_uk)
    k = jnp.concatenate([k, jnp.repeat(k_rope[:, :, None], 4, 2)], -1)
    v = jnp.einsum("bsc,chd->bshd", latent, w_uv)
    q = jnp.concatenate([q_nope, q_rope], -1)
    for absorb in (False, True):
        got = ops.latent_attention(*latents(), absorb=absorb)
        close(got, ops.dot_product_attention(q, k, v))


SHAPES = dict(depth=(3, 6, 2), depth_bias=(6, 2), group=(2, 6, 2, 2), group_bias=(6, 2))


def convolutions():
    parts = [normal(n, *shape) for n, shape in enumerate(SHAPES.values(), 5)]
    return [*parts, jnp.array([0.5, 2.0])]


def inputs(length=7):
    return normal(0, 2, length, 4, 2), normal(1, 2, length, 2, 2)


def test_without_convolutions_only_the_means_are_left(x64):
    q, k = inputs()
    zeros = [jnp.zeros_like(part) for part in convolutions()[:4]]
    new_q, new_k = qk(q, k, *zeros, jnp.array([0.5, 2.0]))
    mean = (q + jnp.repeat(k, 2, 2)) / 2
    close(new_q, 2**0.5 * mean / jnp.linalg.norm(mean, axis=-1, keepdims=True))
    mean = mean.reshape(2, 7, 2, 2, 2).mean(3)
    want = mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)
    close(new_k, 2**0.5 * jnp.array([0.5, 2])[:, None] * want)
    again = qk(3 * q, 3 * k, *zeros, jnp.array([0.5, 2.0]))
    jax.tree.map(close, again, (new_q, new_k))


def test_the_convolutions_are_two_sums_after_zeros(x64):
    (q, k), (depth, depth_bias, group, group_bias, _) = inputs(), convolutions()
    z = np.concatenate([np.zeros((2, 3, 6, 2)), np.concatenate([q, k], 2)], 1)
    y = np.stack([(z[:, t : t + 3] * depth).sum(1) + depth_bias for t in range(8)], 1)
    close(y[:, 0], jnp.broadcast_to(depth_bias, (2, 6, 2)))
    u = np.stack(
        [np.einsum("bahi,ahio->bho", y[:, t : t + 2], group) + group_bias for t in range(7)], 1
    )
    mean = (q + jnp.repeat(k, 2, 2)) / 2
    want = u[:, :, :4] + mean
    want = 2**0.5 * want / np.linalg.norm(want, axis=-1, keepdims=True)
    close(qk(q, k, *convolutions())[0], want)


def test_states_and_segments_continue_and_separate(x64):
    (q, k), state = inputs(), jnp.zeros((2, 3, 6, 2))
    want = qk(q, k, *convolutions())
    parts = []
    for part in (slice(0, 1), slice(1, 3), slice(3, 7)):
        *new, state = qk(q[:, part], k[:, part], *convolutions(), state=state)
        parts.append(new)
    jax.tree.map(close, tuple(jnp.concatenate(x, 1) for x in zip(*parts)), want)
    ids = jnp.array([[0, 0, 1, 1, 1, 2, 3], [4, 4, 5, 5, 5, 6, 7]])
    packed = qk(q, k, *convolutions(), segment_ids=ids)
    x, w = normal(9, 2, 7, 3), normal(10, 3, 4)
    values = ops.shifted_values(x, w, 2 * w, num_heads=2, segment_ids=ids)
    for own in (slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 7)):
        alone = qk(q[:, own], k[:, own], *convolutions())
        jax.tree.map(close, tuple(y[:, own] for y in packed), alone)
        close(values[:, own], ops.shifted_values(x[:, own], w, 2 * w, num_heads=2))


def test_values_are_of_this_token_and_the_one_before(x64):
    x, now, prev = normal(0, 2, 6, 5), normal(1, 5, 4), normal(2, 5, 4)
    v = ops.shifted_values(x, now, prev, num_heads=2)
    close(v[:, :, 0], x @ now)
    close(v[:, 1:, 1], x[:, :-1] @ prev)
    assert (v[:, 0, 1] == 0).all()
    later = ops.shifted_values(x[:, 4:], now, prev, num_heads=2, previous=x[:, 3])
    close(later, v[:, 4:])
    one = ops.shifted_values(x, now, prev, num_heads=1)
    close(one[:, :, 0], jnp.concatenate([v[:, :, 0], v[:, :, 1]], -1))


def test_zero_tokens_have_finite_gradients():
    zeros = [jnp.zeros_like(part) for part in convolutions()]
    q, k = (jnp.zeros_like(x) for x in inputs())
    call = jax.jit(lambda q: qk(q, k, *zeros)[0].sum())
    grads = jax.grad(call)(q)
    assert jnp.isfinite(grads).all()


def test_errors_name_the_argument():
    (q, k), parts = inputs(), convolutions()
    *queries, w_uk, w_uv = latents()
    x, w = normal(0, 2, 6, 5), normal(1, 5, 4)
    state = jnp.zeros((2, 2, 6, 2))

    for message, call in (
        ("w_uk must be", lambda: ops.latent_attention(*queries, w_uk[:2], w_uv)),
        ("w_uv must be", lambda: ops.latent_attention(*queries, w_uk, w_uv[:, :2])),
        ("k has 2 heads", lambda: qk(q[:, :, :3], k, *parts)),
        ("bias_depth must be", lambda: qk(q, k, parts[0], parts[1][:2], *parts[2:])),
        ("temperature must be", lambda: qk(q, k, *parts[:4], jnp.ones(3))),
        ("state must be", lambda: qk(q, k, *parts, state=state)),
        ("num_heads=3 must", lambda: ops.shifted_values(x, w, w, num_heads=3)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
