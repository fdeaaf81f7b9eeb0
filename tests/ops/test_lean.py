import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attn_lab import ops


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def split(x, heads):
    return x.reshape(*x.shape[:2], heads, -1)


def test_lean_attention_is_attention_without_projections(x64):
    x, other = normal(0, 2, 5, 8), normal(1, 2, 6, 8)
    w_q, w_k, align, mask = normal(2, 8, 8), normal(3, 8, 8), normal(4, 6, 6), ops.causal_mask()
    q = split(x @ w_q, 2)
    part = dict(num_heads=2, mask=mask, scale=0.4)
    want = ops.dot_product_attention(
        q, split(other @ w_k, 2), split(other, 2), causal=True, scale=0.4
    )
    close(ops.lean_attention(x, other, other, w_q, w_k, **part), want)
    efficient = ops.lean_attention(x, other, other, w_q, **part)
    close(
        efficient, ops.dot_product_attention(q, split(other, 2), split(other, 2), **part_of(part))
    )
    close(ops.lean_attention(x, other, other, w_q, align=jnp.eye(6), **part), efficient)
    got = ops.lean_attention(x, other, other, w_q, align=align, **part)
    close(got, ops.lean_attention(x, other, jnp.matmul(align, other), w_q, **part))
    batched = jnp.stack([align, jnp.eye(6)])
    got = ops.lean_attention(x, other, other, w_q, align=batched, **part)
    close(got[1], efficient[1])


def part_of(part):
    return {name: part[name] for name in ("mask", "scale")}


def test_head_embeddings(x64):
    x, zero, e = normal(0, 2, 5, 3), jnp.zeros((4, 3)), normal(1, 4, 3)
    for mode in ("add", "multiply"):
        close(ops.head_embedding(x, zero, mode=mode), jnp.repeat(x[:, :, None], 4, 2))
    q = ops.head_embedding(x, normal(2, 4, 3))
    plain, moved = ops.head_embedding(x, zero), ops.head_embedding(x, e)
    want = ops.dot_product_attention(q, plain, plain)
    close(ops.dot_product_attention(q, moved, plain), want)
    close(ops.dot_product_attention(q, plain, moved), want + e)


def test_pooling_is_attention_of_low_rank(x64):
    x, context, w_x, w_c, w_head = (
        normal(n, *s) for n, s in enumerate([(2, 6, 5), (2, 4), (5, 3), (4, 3), (3, 2)])
    )
    small = 1e-4 * context  # where tanh is the identity
    mask = jnp.array([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    got = ops.low_rank_attention_pooling(x, small, w_x, w_c, 1e4 * w_head, mask=mask)
    scores = jnp.einsum("bc,cr,rh,mr,btm->bht", context, w_c, w_head, w_x, x)
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -jnp.inf), -1)
    want = jnp.einsum("bht,btm->bhm", weights, x)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-4, atol=1e-4)
    assert (got[1] == 0).all()


def test_similarity_is_collapsed_attention(x64):
    x, w_q, w_k, w = normal(0, 2, 6, 5), normal(1, 2, 5, 5), normal(2, 2, 5, 5), normal(3, 2, 5, 3)
    q, k = (jnp.einsum("btm,hmn->bthn", x, part) for part in (w_q, w_k))
    v = x[:, :, None]
    joined = jnp.einsum("hmr,hnr->hmn", w_q, w_k)
    mask = ops.causal_mask()
    got = ops.similarity_self_attention(x, joined, mask=mask)
    close(got, ops.dot_product_attention(q, k, v, causal=True))
    got = ops.similarity_self_attention(x, w, symmetric=True, scale=0.2)
    square = jnp.einsum("hmr,hnr->hmn", w, w)
    close(got, ops.similarity_self_attention(x, square, scale=0.2))


def test_errors_name_the_argument():
    x, w = normal(0, 2, 5, 6), normal(1, 6, 6)
    for message, call in (
        ("num_heads=4 must divide", lambda: ops.lean_attention(x, x, x, w, num_heads=4)),
        ("align must be", lambda: ops.lean_attention(x, x, x, w, None, w, num_heads=2)),
        ("mode must be", lambda: ops.head_embedding(x, w, mode="sum")),
        (r"embedding \[H, D\]", lambda: ops.head_embedding(x, w[:, :3])),
        ("w must be", lambda: ops.similarity_self_attention(x, w[None, :, :3])),
        ("mask must be", lambda: ops.low_rank_attention_pooling(x, x[:, 0], w, w, w, mask=w > 0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
