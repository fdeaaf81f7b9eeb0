import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def qkv(length=7, heads=2, dim=4, v_dim=3):
    return tuple(normal(n, 2, length, heads, d) for n, d in enumerate((dim, dim, v_dim)))


def test_refined_gates_at_the_ends_and_in_the_middle(x64):
    g = jnp.linspace(0, 1, 9)
    close(ops.refined_gate(g, jnp.zeros(9)), g**2)
    close(ops.refined_gate(g, jnp.ones(9)), 2 * g - g**2)
    close(ops.refined_gate(g, jnp.full(9, 0.5)), g)
    slope = jax.grad(ops.refined_gate)
    close(jax.vmap(slope)(jnp.array([0.0, 1.0]), jnp.full(2, 0.3)), jnp.array([0.6, 1.4]))


def test_safe_exponentials_have_one_maximum_for_given_axes(x64):
    x = normal(0, 2, 5, 3, 4)
    close(ops.safe_exp_feature_map(x, axes=-1).max(-1), jnp.ones((2, 5, 3)))
    together = ops.safe_exp_feature_map(x, axes=(1, 3))
    close(together.max((1, 3)), jnp.ones((2, 3)))
    close(jax.grad(lambda x: ops.safe_exp_feature_map(x, axes=(1, 3)).sum())(x), together)


def test_refined_attention_with_a_neutral_second_gate_is_gated_attention(x64):
    (q, k, v), gate, state = qkv(), 3 * normal(3, 2, 7, 2, 4), normal(4, 2, 2, 4, 3)
    part = dict(initial_state=state, return_state=True)
    want = ops.gated_linear_attention(
        jnp.exp(q - q.max(-1, keepdims=True)),
        jnp.exp(k - k.max((1, 3), keepdims=True)),
        v,
        jax.nn.log_sigmoid(gate),
        scale=1 / np.sqrt(np.e**2 * 4 * (np.e**2 - 1)),
        **part,
    )
    close(ops.refined_gated_linear_attention(q, k, v, gate, jnp.zeros_like(gate), **part), want)


def test_refined_decays_are_exact_where_gates_saturate():
    pairs = np.array(list(itertools.product([-1e4, -20, 0, 12, 1e4], [-1e4, -20, 0.3, 1e4]))).T
    one = jnp.ones((1, 2, 20, 1))

    def kept(logits):
        """What is left of states of 1 after two steps that write nothing, a pair a head."""
        gate, refine = logits[:, None, None, :, None] * one
        call = ops.refined_gated_linear_attention
        out = call(one, one, 0 * one, gate, refine, initial_state=one[:, 0, :, None])
        return out[0, 1, :, 0]

    got, pullback = jax.vjp(kept, jnp.asarray(pairs, jnp.float32))
    assert np.isfinite(pullback(jnp.ones(20))[0]).all()
    g, r = 1 / (1 + np.exp(-np.clip(pairs, -700, 700)))
    want = (g * ((1 - r) * g + r * (2 - g))) ** 2 / (np.e * np.sqrt(np.e**2 - 1))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-30)


def test_ssd_is_gated_attention_with_a_skip_in_all_forms(x64):
    x, dt = normal(0, 2, 7, 4, 3), jax.nn.softplus(normal(1, 2, 7, 4))
    a, d = -jnp.exp(normal(2, 4)), normal(3, 4)
    b, c = normal(4, 2, 7, 2, 5), normal(5, 2, 7, 2, 5)
    state = normal(6, 2, 4, 5, 3)
    out, last = ops.gated_linear_attention(
        jnp.repeat(c, 2, 2),
        jnp.repeat(b, 2, 2),
        dt[..., None] * x,
        dt * a,
        scale=1.0,
        initial_state=state,
        return_state=True,
    )
    want = out + d[:, None] * x, last
    for form in ("recurrent", "parallel", "chunk"):
        part = dict(initial_state=state, return_state=True, form=form, chunk_size=3)
        close(ops.ssd(x, dt, a, b, c, d, **part), want)
    close(ops.ssd(x, dt, a, b, c, initial_state=state), out)
    frozen = ops.ssd(x, 0 * dt, a, b, c, d, initial_state=state)
    read = jnp.einsum("bthn,bhnp->bthp", jnp.repeat(c, 2, 2), state)
    close(frozen, read + d[:, None] * x)
    for wrong in (dict(a=a[None]), dict(dt=dt[:, :3]), dict(x=x[0])):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*"):
            ops.ssd(**dict(x=x, dt=dt, a=a, b=b, c=c, d=d) | wrong)


def test_blocks_change_nothing_in_lightning_attention(x64):
    (q, k, v), slopes = qkv(9), jnp.array([0.0, 0.7])
    far = jnp.arange(9)[:, None] - jnp.arange(9)
    decay = jnp.where(far >= 0, jnp.exp(-slopes[:, None, None] * far), 0)
    want = 0.5 * jnp.einsum("bthd,bshd,hts,bshe->bthe", q, k, decay, v)
    for size in (4, 64):
        close(ops.lightning_attention(q, k, v, slopes, scale=0.5, block_size=size), want)
    first, state = ops.lightning_attention(
        *(x[:, :4] for x in (q, k, v)), slopes, scale=0.5, return_state=True
    )
    rest = ops.lightning_attention(
        *(x[:, 4:] for x in (q, k, v)), slopes, scale=0.5, initial_state=state
    )
    close(jnp.concatenate([first, rest], 1), want)
    with pytest.raises(ValueError, match="slopes must be"):
        ops.lightning_attention(q, k, v, jnp.zeros((1, 2)))


def test_slopes_fall_with_depth(x64):
    close(ops.lightning_slopes(2), jnp.array([2.0**-4, 2.0**-8]) * (1 + 1e-5))
    close(ops.lightning_slopes(2, 2, 3), jnp.array([2.0**-4, 2.0**-8]) * 1e-5, 1e-12)
    with pytest.raises(ValueError, match="layer_idx"):
        ops.lightning_slopes(2, 3, 3)
