import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import nn, ops

WIDTH = 16


def make(module, **arguments):
    normal = nnx.initializers.normal(0.5)
    return module(WIDTH, rngs=nnx.Rngs(0), kernel_init=normal, **arguments)


def tokens(length=6):
    return jax.random.normal(jax.random.key(length), (2, length, WIDTH))


weights = nnx.jit(lambda mixer, x: mixer.weights(x))
run = nnx.jit(lambda mixer, x, **keywords: mixer(x, **keywords))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["optimised", "efficient", "super"])
def test_lean_attention_is_the_operator_with_an_output_projection(kind):
    mixer, x = make(nn.LeanAttention, kind=kind, num_heads=2, context=8), tokens()
    w_k = mixer.key.kernel[...] if mixer.key is not None else None
    align = None if mixer.align is None else jnp.tril(mixer.align[...])[:6, :6]
    heads = ops.lean_attention(
        x, x, x, mixer.query.kernel[...], w_k, align, num_heads=2, mask=ops.causal_mask()
    )
    close(run(mixer, x), mixer.out(heads.reshape(2, 6, WIDTH)))
    tokens_kept = 1 if kind == "efficient" else 2
    assert mixer.state_bytes(10) == 4 * 10 * WIDTH * tokens_kept


def test_super_attention_has_a_length():
    mixer, x = make(nn.LeanAttention, kind="super", context=5), tokens()
    with pytest.raises(ValueError, match="at most context=5 tokens, got 6"):
        mixer(x)
    _, cache = run(mixer, x[:, :5], cache=mixer.init_cache(2, 8))
    assert jnp.isnan(run(mixer, x[:, 5:], cache=cache)[0]).all()
    both = make(nn.LeanAttention, kind="super", context=6, causal=False)
    slopes = jax.jit(jax.grad(lambda x: both(x)[0, 0, 0]))(x)
    assert (slopes[0, 5] != 0).any()
    with pytest.raises(ValueError, match="exactly context=6 tokens, got 5"):
        both(x[:, :5])


def test_head_embeddings_of_zero_make_heads_equal():
    for mode in ("add", "multiply"):
        mixer, x = make(nn.HeadEmbeddingAttention, mode=mode), tokens()
        assert not np.allclose(weights(mixer, x)[:, 0], weights(mixer, x)[:, 1], atol=1e-4)
        for part in (mixer.query_embedding, mixer.key_embedding):
            part[...] = 0 * part[...]
        close(weights(mixer, x), jnp.repeat(weights(mixer, x)[:, :1], 4, 1))
    small = sum(part.size for part in jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    assert small == 3 * WIDTH * 4 + 3 * 4 * 4 + WIDTH * WIDTH


@pytest.mark.parametrize("symmetric", [False, True])
def test_similarity_attention_is_the_operator_summed(symmetric):
    mixer, x = make(nn.SimilaritySelfAttention, symmetric=symmetric), tokens()
    heads = ops.similarity_self_attention(
        x, mixer.matrices(), symmetric=symmetric, mask=ops.causal_mask()
    )
    close(run(mixer, x), heads.sum(2))
    assert mixer.state_bytes(10) == 4 * 10 * WIDTH
    if symmetric:
        scores = make(nn.SimilaritySelfAttention, symmetric=True, causal=False).scores(x)
        close(scores, jnp.swapaxes(scores, 2, 3))


def test_pooling_reads_its_context():
    x, mask = tokens(), jnp.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]], bool)
    for context in ("learned", "mean", "last"):
        pool = make(nn.LowRankAttentionPooling, num_heads=3, context=context)
        got = run(pool, x, mask=mask)
        assert got.shape == (2, 3 * WIDTH)
        close(got[:1], run(pool, x[:1, :4]))
        close(got[1:], run(pool, x[1:]))
        grads = nnx.jit(nnx.grad(lambda pool: jnp.sin(pool(x)).sum()))(pool)
        assert all((leaf != 0).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (nn.LeanAttention, {"kind": "hyper"}, "kind must be"),
        (nn.LeanAttention, {"head_dim": 2}, "head_dim is not free"),
        (nn.LeanAttention, {"kind": "super"}, "needs context"),
        (nn.LeanAttention, {"kind": "super", "context": 4, "rope_theta": 1e4}, "has positions"),
        (nn.HeadEmbeddingAttention, {"mode": "sum"}, "mode must be"),
        (nn.SimilaritySelfAttention, {"rank": 2}, "rank=2 needs symmetric=True"),
        (nn.LowRankAttentionPooling, {"context": "first"}, "context must be"),
    ],
)
def test_errors_name_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)
