import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_lab import ops

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def arrays(seed=0, length=6, heads=4):
    keys = jax.random.split(jax.random.key(seed), 4)
    q1, k1, q2, k2 = (jax.random.normal(key, (2, length, heads, 3)) for key in keys)
    v = jax.random.normal(jax.random.key(seed + 1), (2, length, heads, 6))
    return q1, k1, q2, k2, v


def rows(function, q1, k1, q2, k2, v, *args, **keywords):
    """The weights of every row, read off the unit vectors as values: [B, T, H, S]."""
    length = v.shape[1]
    unit = jnp.broadcast_to(jnp.eye(length)[:, None], (2, length, v.shape[2], length))
    return function(q1, k1, q2, k2, unit, *args, **keywords)


@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 99), lam=st.floats(-2, 2), causal=st.booleans())
def test_rows_add_up_to_what_the_maps_leave(seed, lam, causal):
    given = arrays(seed)
    difference = rows(ops.differential_attention, *given, lam, causal=causal)
    close(difference.sum(-1), 1 - lam)
    integral = rows(ops.differential_integral_attention, *given, lam, causal=causal)
    close(integral.sum(-1), 1)
    if causal:
        assert (jnp.triu(jnp.swapaxes(integral, 1, 2), 1) == 0).all()


def test_equal_maps_leave_a_share_of_softmax_attention():
    q, k, _, _, v = arrays()
    plain = ops.dot_product_attention(q, k, v)
    close(ops.differential_attention(q, k, q, k, v, 0.3), 0.7 * plain)
    mean = plain.mean(1, keepdims=True)
    close(ops.differential_integral_attention(q, k, q, k, v, 0.3), 0.7 * plain + 0.3 * mean)


@pytest.mark.parametrize("causal", [False, True])
def test_no_lambda_is_softmax_attention_and_lambda_may_differ_by_head(causal):
    q1, k1, q2, k2, v = arrays()
    plain = ops.dot_product_attention(q1, k1, v, causal=causal)
    lam = jnp.array([0.0, 0.5, -1.0, 0.0])
    for function in ops.differential_attention, ops.differential_integral_attention:
        close(function(q1, k1, q2, k2, v, 0.0, causal=causal), plain)
        got = function(q1, k1, q2, k2, v, lam, causal=causal)
        assert jnp.abs(got - plain).max((0, 1, 3)).tolist() > [0, 0.01, 0.01, 0]
        close(got[:, :, [0, 3]], plain[:, :, [0, 3]])


def test_a_mask_says_whose_attention_is_averaged():
    """Segments of a packed row are what each is alone; a dense causal mask is `causal`."""
    given, ids = arrays(), jnp.array([[0, 0, 1, 1, 1, 1]] * 2)
    for causal in False, True:
        whole = ops.differential_integral_attention(
            *given, 0.4, causal=causal, mask=ops.segment_mask(ids)
        )
        for part in slice(0, 2), slice(2, 6):
            alone = (x[:, part] for x in given)
            want = ops.differential_integral_attention(*alone, 0.4, causal=causal)
            close(whole[:, part], want)
    dense = jnp.tril(jnp.ones((6, 6), bool))
    masked = ops.differential_integral_attention(*given, 0.4, mask=dense)
    close(masked, ops.differential_integral_attention(*given, 0.4, causal=True))


def test_keys_of_another_length_are_averaged_over_all_queries():
    q1, k1, q2, k2, v = arrays()
    got = ops.differential_integral_attention(q1[:, :2], k1, q2[:, :2], k2, v, 0.5)
    a, b = (ops.dot_product_attention(q[:, :2], k, v) for q, k in ((q1, k1), (q2, k2)))
    close(got, a - 0.5 * b + 0.5 * a.mean(1, keepdims=True))
    for part in {"causal": True}, {"mask": jnp.ones((2, 6), bool)}:
        with pytest.raises(ValueError, match="as many queries as keys, got 2 and 6"):
            ops.differential_integral_attention(q1[:, :2], k1, q2[:, :2], k2, v, 0.5, **part)


def test_first_lambdas():
    close([ops.differential_lambda_init(n) for n in (0, 3, 1000)], [0.2, 0.8 - 0.6 * 0.40657, 0.8])
    zeros = [jnp.zeros(3)] * 4
    close(ops.differential_lambda(*zeros, lambda_init=0.25), 0.25)


def test_errors_name_the_argument():
    q1, k1, q2, k2, v = arrays()
    with pytest.raises(ValueError, match="q2 has 3 heads, which do not divide the 4"):
        ops.differential_attention(q1, k1, q2[:, :, :3], k2[:, :, :3], v, 0.5)
    with pytest.raises(ValueError, match=r"lam must be a number or \[4\]"):
        ops.differential_attention(q1, k1, q2, k2, v, jnp.ones(2))
