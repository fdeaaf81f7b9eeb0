import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops

wkv = jax.jit(ops.wkv)
close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-9)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, float)


def example():
    return 3 * normal(0, 2, 9, 4), normal(1, 2, 9, 4), normal(2, 4), normal(3, 4)


def test_averages_are_convex_and_blind_to_a_common_factor(x64):
    k, v, decay, first = example()
    got = wkv(k, v, decay, first)
    close(got[:, 0], v[:, 0])
    assert (got <= jax.lax.cummax(v, 1) + 1e-12).all()
    close(wkv(k + 700, v, decay, first), got)
    close(wkv(k, v + 2, decay, first), got + 2)


def test_without_decay_and_bonus_it_is_a_running_softmax(x64):
    k, v, *_ = example()
    got = wkv(k, v, jnp.full(4, -jnp.inf), jnp.zeros(4))
    for t in range(9):
        close(got[:, t], (jax.nn.softmax(k[:, : t + 1], 1) * v[:, : t + 1]).sum(1))


def test_infinite_decay_leaves_the_last_two_tokens(x64):
    k, v, _, first = example()
    got = wkv(k, v, jnp.full(4, 20.0), first)
    pair = jnp.stack([k[:, :-1], k[:, 1:] + first])
    want = (jax.nn.softmax(pair, 0) * jnp.stack([v[:, :-1], v[:, 1:]])).sum(0)
    close(got[:, 1:], want)


def test_gradients_pass_through_a_state_that_is_handed_over(x64):
    arrays = example()

    def whole(k, v, *rest):
        return jnp.sin(ops.wkv(k, v, *rest)).sum()

    def halves(k, v, *rest):
        head, state = ops.wkv(k[:, :4], v[:, :4], *rest, return_state=True)
        tail = ops.wkv(k[:, 4:], v[:, 4:], *rest, initial_state=state)
        return jnp.sin(jnp.concatenate([head, tail], 1)).sum()

    want, got = (jax.jit(jax.grad(f, (0, 1, 2, 3)))(*arrays) for f in (whole, halves))
    jax.tree.map(close, got, want)


def test_segments_are_apart_and_padding_counts_nothing(x64):
    k, v, decay, first = example()
    ids = jnp.array([[-1, 0, 0, -1, 0, 5, 5, -1, 5]] * 2)
    got = wkv(k, v, decay, first, segment_ids=ids)
    assert jnp.isfinite(got).all()
    for own in jnp.array([1, 2, 4]), jnp.array([5, 6, 8]):
        close(got[:, own], wkv(k[:, own], v[:, own], decay, first))


def test_huge_and_impossible_keys_give_finite_gradients():
    k = jnp.array([-jnp.inf, 1e4, -1e4, 0.0, -jnp.inf, 80.0])[None, :, None]
    v = jnp.arange(6.0)[None, :, None]
    out, pull = jax.vjp(wkv, k, v, jnp.ones(1), jnp.ones(1))
    assert jnp.isfinite(out).all() and all(jnp.isfinite(x).all() for x in pull(out))
    np.testing.assert_allclose(out[0, 1:3, 0], 1)


def test_errors_name_the_argument():
    x = jnp.ones((1, 2, 3))
    with pytest.raises(ValueError, match="k and v must be"):
        ops.wkv(x, x[:, 1:], x[0, 0], x[0, 0])
    with pytest.raises(ValueError, match=r"time_first must be \[C\] = \[3\]"):
        ops.wkv(x, x, x[0, 0], x[0, 0, :1])
