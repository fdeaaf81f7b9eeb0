import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_kernels.attention import Mask
from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def qkv(heads=4, key_heads=4, value_heads=4, length=7):
    return tuple(normal(n, 2, length, h, 6) for n, h in enumerate((heads, key_heads, value_heads)))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_merging_is_a_mix_and_equal_heads_merge_exactly(x64):
    x, weight = normal(0, 2, 5, 6, 3), normal(1, 6)
    blocks = jnp.where(jnp.arange(6) // 2 == jnp.arange(3)[:, None], weight, 0)
    close(ops.merge_key_value_heads(x, weight, num_groups=3), ops.mix_heads(x, blocks))
    repeated = jnp.repeat(x[:, :, :3], 2, 2)
    close(ops.merge_key_value_heads(repeated, jnp.full(6, 0.5), num_groups=3), x[:, :, :3])
    by_channel = jnp.broadcast_to(weight[:, None], (6, 3))
    close(
        ops.merge_key_value_heads(x, by_channel, num_groups=2),
        ops.merge_key_value_heads(x, weight, num_groups=2),
    )


def test_mixes_compose_along_any_axis(x64):
    x, a, b = normal(0, 2, 5, 4, 3), normal(1, 3, 4), normal(2, 5, 3)
    close(ops.mix_heads(x, jnp.eye(4)), x)
    close(ops.mix_heads(ops.mix_heads(x, a), b), ops.mix_heads(x, b @ a))
    turned = jnp.moveaxis(x, 2, 0)
    for axis in (0, -4):
        close(ops.mix_heads(turned, a, axis=axis), jnp.moveaxis(ops.mix_heads(x, a), 2, 0))


def test_decoupled_heads_read_what_their_maps_say(x64):
    q, k, v = qkv(4, 2, 3)
    keys, values = (1, 0, 0, 1), (2, 2, 0, 1)
    maps = dict(key_head=keys, value_head=values)
    got = jax.jit(lambda *qkv: ops.decoupled_head_attention(*qkv, **maps, causal=True))(q, k, v)
    attend = jax.jit(lambda *qkv: ops.dot_product_attention(*qkv, causal=True))
    for h in range(4):
        close(got[:, :, [h]], attend(q[:, :, [h]], k[:, :, [keys[h]]], v[:, :, [values[h]]]))
    traced = jax.jit(lambda *arrays: ops.decoupled_head_attention(*arrays, causal=True))
    close(traced(q, k, v, jnp.array(keys), jnp.array(values)), got)
    q, k, v = qkv(4, 2, 2)
    want = ops.dot_product_attention(q, k, v, scale=0.3)
    close(ops.decoupled_head_attention(q, k, v, (0, 0, 1, 1), (0, 0, 1, 1), scale=0.3), want)


def test_differential_qkv_lifts_keys_and_scales_by_their_width(x64):
    q, k, v = qkv(4, 2, 2)
    close(ops.differential_qkv_attention(q, k, v), ops.dot_product_attention(q, k, v))
    q, k, v = qkv(4, 1, 2)
    narrow, up = k[..., :3], normal(5, 3, 6)
    lifted = jnp.repeat(narrow @ up, 4, 2)
    want = ops.dot_product_attention(q, lifted, v, scale=3**-0.5, causal=True)
    close(ops.differential_qkv_attention(q, narrow, v, up, causal=True), want)


def test_equal_logits_make_a_mixture_of_heads_plain_attention(x64):
    zeros = jnp.zeros((2, 3, 4))
    gates, loss = ops.mixture_of_heads_gates(zeros, top_k=4)
    close(gates, jnp.ones((2, 3, 4)))
    close(loss, 4)
    gates, _ = ops.mixture_of_heads_gates(zeros, zeros[..., :3], zeros[..., :2], top_k=2)
    close(gates, jnp.broadcast_to(jnp.array([1.0] * 3 + [1, 1, 0, 0]), (2, 3, 7)))


@hypothesis.settings(deadline=None, max_examples=10)
@hypothesis.given(st.integers(0, 1000), st.integers(1, 4))
def test_gates_of_a_mixture_of_heads(seed, top_k):
    routed, shared, balance = normal(seed, 2, 3, 4), normal(1, 2, 3, 2), normal(2, 2, 3, 2)
    gates, _ = ops.mixture_of_heads_gates(routed, shared, balance, top_k=top_k)
    a = 2 * jax.nn.softmax(balance)
    np.testing.assert_allclose(gates[..., :2].sum(-1), 2 * a[..., 0], rtol=1e-5)
    np.testing.assert_allclose(gates[..., 2:].sum(-1), top_k * a[..., 1], rtol=1e-5)
    on = gates[..., 2:] > 0
    assert (on.sum(-1) == top_k).all()
    smallest_on = jnp.where(on, routed, jnp.inf).min(-1)
    assert (smallest_on >= jnp.where(on, -jnp.inf, routed).max(-1)).all()


def test_leave_one_out_gates_are_the_mixture_of_experts(x64):
    heads, logits = normal(0, 2, 4, 5), normal(1, 2, 4)
    weights = jax.nn.softmax(logits)
    experts = 4 / 3 * (heads.sum(1, keepdims=True) - heads)
    gates = ops.leave_one_out_head_gates(logits)
    close(jnp.einsum("bh,bhd->bd", gates, heads), jnp.einsum("bh,bhd->bd", weights, experts))
    close(gates.sum(-1), 4)
    close(ops.leave_one_out_head_gates(jnp.zeros((2, 4))), 1)
    one = jnp.array([0, -jnp.inf, -jnp.inf])
    close(ops.leave_one_out_head_gates(one), jnp.array([0, 1.5, 1.5]))


@pytest.mark.parametrize(("causal", "key_heads"), [(True, 4), (False, 2)])
def test_long_and_short_heads(x64, causal, key_heads):
    """With a mask that differs between heads, and fewer queries than keys."""
    q, k, v = qkv(4, key_heads, key_heads)
    q, mask = q[:, 2:], jax.random.bernoulli(jax.random.key(9), 0.7, (1, 4, 5, 7))
    mask = ops.as_mask(mask) & Mask(lambda b, h, i, j: (h != 2) | (j < 3))
    near = ops.sliding_window_mask(2, 0 if causal else 2)
    part = dict(mask=mask, causal=causal, scale=0.3)

    @jax.jit
    def run(q, k, v):
        far = ops.dot_product_attention(q, k, v, **part)
        short = ops.dot_product_attention(q, k, v, **part | {"mask": mask & near})
        mixed = {
            (n, window): ops.long_short_attention(q, k, v, num_local_heads=n, window=window, **part)
            for n, window in ((0, 3), (1, 3), (2, 3), (4, 3), (3, 7))
        }
        return far, short, mixed

    far, short, mixed = run(q, k, v)
    close(mixed.pop((3, 7)), far)
    for (n, _), got in mixed.items():
        close(got, jnp.concatenate([short[:, :, :n], far[:, :, n:]], 2))


def test_errors_name_the_argument():
    q, k, v = qkv()
    x = normal(0, 2, 5, 4, 3)
    for message, call in (
        ("num_groups=3 must", lambda: ops.merge_key_value_heads(x, jnp.ones(4), num_groups=3)),
        (r"weight must be \[4\]", lambda: ops.merge_key_value_heads(x, jnp.ones(3), num_groups=2)),
        (r"weight must be \[N, 4\]", lambda: ops.mix_heads(x, jnp.ones((4, 3)))),
        (r"key_head must be integers \[4\]", lambda: decoupled(q, k, v, (0, 1))),
        (r"key_head must be integers", lambda: decoupled(q, k, v, (0.0, 1.0, 2.0, 3.0))),
        ("key_head must be of 0 to 3, got", lambda: decoupled(q, k, v, (0, 1, 2, 4))),
        ("key_up must be", lambda: ops.differential_qkv_attention(q, k, v, jnp.ones((5, 6)))),
        ("top_k must be of 1 to 3", lambda: ops.mixture_of_heads_gates(x[:, 0], top_k=5)),
        ("come together", lambda: ops.mixture_of_heads_gates(x[:, 0], x[:, 0], top_k=1)),
        ("at least two heads", lambda: ops.leave_one_out_head_gates(jnp.ones((2, 1)))),
        ("num_local_heads must be of 0 to 4", lambda: long_short(q, k, v, 5, 2)),
        ("window must be at least 1", lambda: long_short(q, k, v, 1, 0)),
        ("k has 3 heads", lambda: long_short(q, k[:, :, :3], v, 1, 2)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def decoupled(q, k, v, key_head):
    return ops.decoupled_head_attention(q, k, v, key_head, (0, 1, 2, 3))


def long_short(q, k, v, num_local_heads, window):
    return ops.long_short_attention(q, k, v, num_local_heads=num_local_heads, window=window)
