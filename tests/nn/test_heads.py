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


@pytest.fixture(scope="module")
def plain():
    return make(nn.MultiHeadAttention, num_kv_heads=2)


def share(mixer, plain):
    """The projections of another mixer."""
    for name in ("query", "key", "value", "out"):
        setattr(mixer, name, getattr(plain, name))
    return mixer


def test_decoupled_heads_in_blocks_are_grouped_attention(plain):
    sizes = dict(num_key_heads=2, num_value_heads=2)
    mixer = share(make(nn.DecoupledHeadAttention, **sizes), plain)
    assert mixer.key_head == mixer.value_head == (0, 0, 1, 1)
    close(run(mixer, tokens()), run(plain, tokens()))
    other = share(make(nn.DecoupledHeadAttention, key_head=(1, 1, 0, 0), **sizes), plain)
    q, k, _, mask, _ = plain._inputs(tokens(), None, None)
    close(other.scores(tokens()), plain._scores(q, k[:, :, ::-1], mask))


def test_differential_qkv_has_a_state_of_few_narrow_keys():
    mixer = make(nn.DifferentialQKVAttention, num_heads=8, key_dim=1)
    assert mixer.state_bytes(10) == 4 * 10 * (1 * 1 + 4 * 2)
    assert mixer.query.layers[0].kernel.shape == (16, 24)
    q, k, *_ = mixer._inputs(tokens(), None, None)
    want = ops.dot_product_attention(
        q, k @ mixer.key_up[...], jnp.ones((2, 6, 8, 1)), causal=True, scale=1, return_weights=True
    )[1]
    close(jax.nn.softmax(mixer.scores(tokens())), want)


def test_a_mixture_of_heads_with_equal_logits_is_multi_head_attention(plain):
    mixer = share(make(nn.MixtureOfHeads, num_kv_heads=2, top_k=3), plain)
    x = tokens()
    assert mixer.shared is None and not np.allclose(run(mixer, x), run(plain, x), atol=1e-2)
    gates, loss = mixer.gates(x)
    assert gates.shape == (2, 6, 4) and loss == mixer.balance_loss(x)
    for layer in (mixer.routed, mixer.balance):
        layer.kernel[...] = 0 * layer.kernel[...]
    close(run(mixer, x), run(plain, x))
    close(mixer.balance_loss(x), 3)


def test_the_balance_loss_trains_the_router():
    mixer = make(nn.MixtureOfHeads, num_shared_heads=0, top_k=1)
    grads = nnx.jit(nnx.grad(lambda mixer: mixer.balance_loss(tokens())))(mixer)
    assert (grads.routed.kernel[...] != 0).any() and (grads.query.kernel[...] == 0).all()


def test_gates_of_attentive_experts_read_means(plain):
    x, ids = tokens(), jnp.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 2, 2, 3]])
    mixer = make(nn.MixtureOfAttentiveExperts, num_kv_heads=2)
    full = make(nn.MixtureOfAttentiveExperts, causal=False)

    def want(mixer, part):
        return ops.leave_one_out_head_gates(mixer.gate_out(jnp.tanh(mixer.gate_in(part))))

    gates = nnx.jit(lambda mixer, ids: mixer.gates(x, segment_ids=ids))
    close(gates(mixer, None)[:, 3], want(mixer, x[:, :4].mean(1)))
    close(gates(mixer, ids)[1, 4], want(mixer, x[1, 3:5].mean(0)))
    close(gates(full, None)[:, 2], want(full, x.mean(1)))
    close(gates(full, ids)[0, 3], want(full, x[0, 2:].mean(0)))
    mixer.gate_out.kernel[...] = 0 * mixer.gate_out.kernel[...]
    close(run(share(mixer, plain), x), run(plain, x))


def test_sampled_experts_lack_one_head_and_do_not_train_the_gate():
    mixer, x = make(nn.MixtureOfAttentiveExperts, sample_experts=True), tokens(1)

    def loss(mixer):
        return jnp.sin(mixer(x, rngs=nnx.Rngs(dropout=3))).sum()

    grads = nnx.jit(nnx.grad(loss))(mixer)
    assert (grads.gate_out.kernel[...] == 0).all() and (grads.value.kernel[...] != 0).any()
    q, k, v, mask, _ = mixer._inputs(x, None, None)
    heads = mixer._attend(q, k, v, mask, None)
    experts = [mixer._project(4 / 3 * heads.at[:, :, j].set(0), x) for j in range(4)]
    got = mixer(x, rngs=nnx.Rngs(dropout=3))
    for row in range(2):
        assert any(np.allclose(got[row], expert[row], atol=1e-5) for expert in experts)


def test_long_and_short_heads_keep_what_they_see(plain):
    mixer = share(make(nn.LongShortAttention, num_kv_heads=2, window=2), plain)
    seen = weights(mixer, tokens()) > 0
    assert (seen[:, :3].sum(-1) <= 2).all() and seen[:, 3, -1].all()
    np.testing.assert_array_equal(jnp.isfinite(mixer.scores(tokens())), seen)
    assert mixer.state_bytes(10) == 4 * (4 + 4) * (2 + 10)
    wide = share(make(nn.LongShortAttention, num_kv_heads=2), plain)
    close(run(wide, tokens()), run(plain, tokens()))
    both = make(nn.LongShortAttention, window=2, num_local_heads=4, causal=False)
    seen = weights(both, tokens())[:, :, 2] > 0
    assert (seen == jnp.array([False, True, True, True, False, False])).all()


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (nn.DecoupledHeadAttention, {"num_kv_heads": 2}, "num_kv_heads: give num_key_heads"),
        (nn.DecoupledHeadAttention, {"key_head": (0, 1, 2, 3)}, "key_head must be 4 integers"),
        (nn.DecoupledHeadAttention, {"num_value_heads": 0}, "num_value_heads must be at least 1"),
        (nn.DifferentialQKVAttention, {"num_kv_heads": 2}, "num_kv_heads: give num_key_heads"),
        (nn.DifferentialQKVAttention, {"num_key_heads": 3}, "num_key_heads"),
        (nn.DifferentialQKVAttention, {"key_dim": 2, "rope_theta": 1e4}, "does not commute"),
        (nn.MixtureOfHeads, {"num_shared_heads": 4}, "num_shared_heads must be of 0 to 3"),
        (nn.MixtureOfHeads, {"top_k": 4}, "top_k must be of 1 to 3"),
        (nn.MixtureOfAttentiveExperts, {"num_heads": 1}, "num_heads must be at least 2"),
        (nn.LongShortAttention, {"num_local_heads": 5}, "num_local_heads must be of 0 to 4"),
        (nn.LongShortAttention, {"window": 0}, "window must be at least 1"),
    ],
)
def test_errors_name_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)
