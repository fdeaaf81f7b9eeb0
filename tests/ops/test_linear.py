import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def inputs(seed=0, q_len=9, k_len=9, heads=2, dim=4, v_dim=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (2, q_len, heads, dim))
    k = jax.random.normal(keys[1], (2, k_len, heads, dim))
    return (
        q,
        k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        jax.random.normal(keys[2], (2, k_len, heads, v_dim)),
    )


def close(got, want, tolerance=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def explicit(q, k, v, phi, normalization, causal, eps):
    weights = jnp.einsum("bthd,bshd->bhts", phi(q), phi(k))
    if causal:
        weights *= jnp.tri(*weights.shape[2:], weights.shape[3] - weights.shape[2])
    if normalization == "subtraction":
        weights += 1 / weights.shape[3] - weights.mean(-1, keepdims=True)
    if normalization == "division":
        total = weights.sum(-1, keepdims=True) + eps
        weights /= jnp.where(total == 0, 1, total)
    return jnp.einsum("bhts,bshe->bthe", weights, v)


@pytest.mark.parametrize("name", sorted(ops.feature_maps))
@pytest.mark.parametrize("lengths", [(9, 9), (4, 9), (9, 4)])
def test_explicit_weights(x64, name, lengths):
    q, k, v = inputs(0, *lengths)
    phi = ops.feature_map(name)
    cases = [("division", True), ("none", True), ("none", False), ("subtraction", False)]
    for normalization, causal in cases[name in ("identity", "elu", "silu") :]:
        options = dict(normalization=normalization, causal=causal, eps=0.1)
        got = ops.linear_attention(q, k, v, feature_map=name, chunk_size=4, **options)
        close(got, explicit(q, k, v, phi, **options))


def test_pair_of_maps_and_grouped_heads(x64):
    q, k, v = inputs()
    for causal in (True, False):
        options = dict(causal=causal, feature_map=("relu", jnp.exp), normalization="none")
        got = ops.linear_attention(q, k[:, :, :1], v[:, :, :1], **options)
        k2, v2 = (jnp.repeat(x[:, :, :1], 2, 2) for x in (k, v))
        close(got, ops.linear_attention(q, k2, v2, **options))


def test_taylor2_is_the_expansion_of_exp(x64):
    q, k, _ = inputs()
    phi, s = ops.feature_map("taylor2"), (q * k).sum(-1) / 2
    close((phi(q) * phi(k)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalization", ["division", "none"])
def test_state(x64, causal, normalization):
    q, k, v = inputs()
    options = dict(normalization=normalization, causal=causal, return_state=True)
    out, state = ops.linear_attention(q, k, v, **options)
    _, early = ops.linear_attention(q, k[:, :5], v[:, :5], **options)
    got = ops.linear_attention(q[:, 5:], k[:, 5:], v[:, 5:], initial_state=early, **options)
    close(got, (out[:, 5:], state))


def test_identities_of_linear_attention(x64):
    q, k, v = inputs()
    causal, full = (ops.linear_attention(q, k, v, causal=c) for c in (True, False))
    close(causal[:, -1], full[:, -1])
    close(ops.linear_attention(q, k, jnp.ones_like(v), eps=0.0), jnp.ones_like(v))
    nothing = ops.linear_attention(q, k[:, :4], v[:, :4], causal=True, eps=0.0)
    assert not nothing[:, :5].any() and np.isfinite(nothing).all()
    grads = jax.grad(lambda q: ops.linear_attention(q, k, v, feature_map="elu1").sum())(q * 1e4)
    assert np.isfinite(grads).all()


def test_retention_and_gates(x64):
    q, k, v = inputs()
    gates = jnp.log1p(-(2.0 ** (-5 - jnp.arange(2))))
    scalar = jnp.broadcast_to(gates, q.shape[:3])
    want = ops.retention(q, k, v, form="recurrent")
    close(ops.gated_linear_attention(q, k, v, scalar, chunk_size=4), want)
    channels = jnp.broadcast_to(scalar[..., None], q.shape)
    close(ops.gated_linear_attention(q, k, v, channels, chunk_size=8, sub_chunk_size=2), want)
    here = 0.5 * (q * k).sum(-1, keepdims=True) * v
    close(ops.gated_linear_attention(q, k, v, jnp.full_like(q, -jnp.inf)), here)
    plain = ops.linear_attention(q, k, v, feature_map="identity", normalization="none", causal=True)
    close(ops.retention(q, k, v, log_decay=jnp.zeros(2), scale=1.0), plain)


def test_delta_rule_identities(x64):
    q, k, v = inputs()
    one = jnp.ones(k.shape[:3])
    close(ops.delta_rule(k, k, v, one, scale=1.0), v)
    close(ops.gated_delta_rule(q, k, v, one, 0 * one), ops.delta_rule(q, k, v, one))
    state = jnp.ones((2, 2, 4, 3))
    _, same = ops.delta_rule(q, k, v, 0 * one, initial_state=state, return_state=True)
    close(same, state)
    eye = jnp.broadcast_to(jnp.eye(4)[None, :, None], (2, 4, 2, 4))
    got = ops.delta_rule(q[:, :4], eye, v[:, :4], one[:, :4], scale=1.0)
    options = dict(feature_map="identity", normalization="none", causal=True)
    close(got, ops.linear_attention(q[:, :4], eye, v[:, :4], **options))
    forget = jnp.zeros(k.shape[:3]).at[:, 5].set(-jnp.inf)
    packed = ops.gated_delta_rule(q, k, v, one / 2, forget)
    close(packed[:, 5:], ops.delta_rule(q[:, 5:], k[:, 5:], v[:, 5:], one[:, 5:] / 2))


def test_errors():
    q, k, v = inputs()
    for options, match in [
        (dict(feature_map="cube"), "feature_map"),
        (dict(normalization="sum"), "normalization"),
        (dict(normalization="subtraction", causal=True), "subtraction"),
        (dict(initial_state=jnp.ones((2, 2, 4, 3))), "initial_state"),
        (dict(causal=True, form="fast"), "form"),
    ]:
        with pytest.raises(ValueError, match=match):
            ops.linear_attention(q, k, v, **options)
    with pytest.raises(ValueError, match="log_decay"):
        ops.retention(q, k, v, log_decay=jnp.zeros((2, 2)))
