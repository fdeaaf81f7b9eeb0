import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def qkv(q_len=5, k_len=5, heads=2, dim=4):
    """With values that make outputs the weights themselves."""
    v = jnp.broadcast_to(jnp.eye(k_len)[None, :, None], (2, k_len, heads, k_len))
    return normal(0, 2, q_len, heads, dim), normal(1, 2, k_len, heads, dim), v


def angles(length=5, dim=4):
    turn = jnp.repeat(normal(7, length, dim // 2), 2, -1)
    return dict(sin=jnp.sin(turn), cos=jnp.cos(turn))


def test_efficient_attention_has_rows_that_sum_to_one(x64):
    q, k, v = qkv(4, 6)
    weights = ops.efficient_attention(q, k, v)
    close(weights.sum(-1), jnp.ones((2, 4, 2)))
    assert (weights > 0).all()
    moved = ops.efficient_attention(q + normal(2, 2, 4, 2, 1), k + normal(3, 2, 1, 2, 4), v)
    close(moved, weights)
    pooled = ops.efficient_attention(q[..., :1], k[..., :1], v)
    close(pooled, jnp.broadcast_to(pooled[:, :1], pooled.shape))


def test_efficient_attention_does_not_read_masked_keys(x64):
    q, k, v = qkv(4, 6)
    mask = jnp.arange(6) < jnp.array([[4], [0]])
    got, slopes = jax.value_and_grad(
        lambda k: (ops.efficient_attention(q, k, v, mask=mask) ** 2).sum()
    )(k)
    want = ops.efficient_attention(q[:1], k[:1, :4], v[:1, :4])
    close(got, (want**2).sum())
    assert (slopes[0, :4] != 0).all() and (slopes[0, 4:] == 0).all() and (slopes[1] == 0).all()
    with pytest.raises(ValueError, match="mask must be bool"):
        ops.efficient_attention(q, k, v, mask=mask[:, :3])


def test_flow_attention_does_not_know_an_order(x64):
    q, k, v = qkv(4, 6)
    order = jnp.array([3, 5, 0, 1, 4, 2])
    close(ops.flow_attention(q, k[:, order], v[:, order]), ops.flow_attention(q, k, v))
    back = ops.flow_attention(q[:, ::-1], k, v)
    close(back[:, ::-1], ops.flow_attention(q, k, v))
    with pytest.raises(ValueError, match="as many keys as queries"):
        ops.flow_attention(q, k, v, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_one_key_flows_to_the_query_through_a_gate(causal, x64):
    """With one pair I = O = Q.K, so that arrivals are Q.K / (Q.K) = 1."""
    q, k, v = qkv(1, 1)
    close(ops.flow_attention(q, k, v, causal=causal, eps=0), jax.nn.sigmoid(1.0) * v)


def test_causal_flow_between_positions_alike_is_a_running_mean(x64):
    q, k, v = qkv(2, 2)
    q, k = (jnp.broadcast_to(x[:, :1], x.shape) for x in (q, k))
    got = ops.flow_attention(q, k, v, causal=True, eps=0)
    close(
        got,
        jax.nn.sigmoid(1.0) * jnp.array([[1, 0], [0.5, 0.5]])[None, :, None] * jnp.ones(v.shape),
    )


def test_magnitude_aware_rows_sum_to_one_and_spread_with_the_query(x64):
    q, k, v = qkv(4, 6)
    weights = ops.magnitude_aware_linear_attention(q, k, v, eps=0)
    close(weights.sum(-1), jnp.ones((2, 4, 2)))
    features = jax.nn.elu(jnp.abs(q)) + 1

    def spread(c):
        """Queries whose features are c times as large."""
        weights = ops.magnitude_aware_linear_attention(c * features - 1, k, v, eps=0)
        return weights.max(-1) - weights.min(-1)

    first, second, third = map(spread, (1.0, 2.0, 3.0))
    assert (second > first).all()
    close(third - second, second - first)


def test_norm_aware_weights_are_convex_and_blind_to_the_size_of_keys(x64):
    q, k, v = qkv(4, 6)
    weights = ops.norm_aware_linear_attention(q, k, v, eps=0)
    close(weights.sum(-1), jnp.ones((2, 4, 2)))
    assert (weights >= 0).all()
    close(ops.norm_aware_linear_attention(q, 3 * k, v, eps=0), weights)
    close(ops.norm_aware_linear_attention(-q, -k, v, eps=0), weights)
    still = dict(q_offset=2e6, q_power=1e-6, eps=0)  # the exponent is nearly 2 for every norm
    a, b = (ops.norm_aware_linear_attention(c * q, k, v, **still) for c in (1, 5))
    close(a, b, 1e-5)
    assert jnp.abs(a - weights).max() > 1e-3


def test_norm_aware_attention_of_a_query_of_zero_is_zero_with_finite_slopes():
    q, k, v = qkv()
    q = q.at[:, 2].set(0).at[:, :, :, 1].set(0)
    call = ops.norm_aware_linear_attention
    out, slopes = jax.value_and_grad(lambda *x: jnp.sum(call(*x, **angles()) ** 2), (0, 1))(q, k, v)
    assert (call(q, k, v)[:, 2] == 0).all()
    assert jnp.isfinite(out) and all(jnp.isfinite(x).all() for x in slopes)


def test_gates_remove_keys_and_values(x64):
    q, k, v = qkv(4, 6)
    one, none = jnp.ones((6, 2)), jnp.ones((6, 2)).at[2].set(0)
    call = ops.kv_gated_linear_attention

    def shifted(x):
        return jax.nn.relu(x) + 1e-6

    want = ops.linear_attention(q, k, v, feature_map=shifted, eps=6e-6)
    close(call(q, k, v, one, one), want)
    close(call(q, k, v, 3 * one, one, eps=0), call(q, k, v, one, one, eps=0))
    rest = [0, 1, 3, 4, 5]
    others = [x[:, jnp.array(rest)] for x in (k, v)]
    close(call(q, k, v, none, one, eps=0), call(q, *others, one[1:], one[1:], eps=0))
    close(call(q, k, v, one, none), want.at[..., 2].set(0))
    each = jnp.stack([one, none])
    close(call(q, k, v, each, one)[1], call(q, k, v, none, one)[1])
    with pytest.raises(ValueError, match="value_gate must be"):
        call(q, k, v, one, one[1:])


def test_angles_of_zero_leave_linear_attention(x64):
    q, k, v = qkv()
    zero = jnp.zeros((5, 4))
    got = ops.rotary_linear_attention(q, k, v, zero, zero + 1)
    close(got, ops.linear_attention(q, k, v, eps=5e-6))
    for call in (ops.magnitude_aware_linear_attention, ops.norm_aware_linear_attention):
        close(call(q, k, v, sin=zero, cos=zero + 1), call(q, k, v))


def test_rotations_stay_out_of_the_denominator(x64):
    q, k, v = qkv()
    turned = angles()
    weights = jnp.einsum(
        "bthd,bshd->bths",
        *(complex_turn(jax.nn.elu(x) + 1, **turned) for x in (q, k)),
    )
    plain = jnp.einsum("bthd,bshd->bths", jax.nn.elu(q) + 1, jax.nn.elu(k) + 1)
    want = weights / (plain.sum(-1, keepdims=True) + 5e-6)
    close(ops.rotary_linear_attention(q, k, v, **turned), want)
    per_head = {n: jnp.stack([x, x], 1) for n, x in turned.items()}
    close(
        ops.rotary_linear_attention(q, k[:, :, :1], v[:, :, :1], **per_head)[:, :, 0], want[:, :, 0]
    )


def complex_turn(x, sin, cos):
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * (cos + 1j * sin)[:, None, 0::2]
    return jnp.stack([turned.real, turned.imag], -1).reshape(x.shape)


def test_angles_that_do_not_fit_are_refused():
    q, k, v = qkv()
    turned = angles()
    with pytest.raises(ValueError, match="together"):
        ops.magnitude_aware_linear_attention(q, k, v, sin=turned["sin"])
    with pytest.raises(ValueError, match="cos must be"):
        ops.rotary_linear_attention(q, k, v, turned["sin"], turned["cos"][1:])
    with pytest.raises(ValueError, match="as many keys"):
        ops.norm_aware_linear_attention(q, k[:, 1:], v[:, 1:], **turned)
    with pytest.raises(ValueError, match="even"):
        ops.rotary_linear_attention(q[..., 1:], k[..., 1:], v, *turned.values())
