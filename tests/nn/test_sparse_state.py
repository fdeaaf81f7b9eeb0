import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import SSE, l2_norm


def make(**arguments):
    build = dict(rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))
    return SSE(8, num_heads=2, **build | arguments)


def tokens(length=9):
    return jax.random.normal(jax.random.key(length), (2, length, 8))


def test_the_state_does_not_grow_and_partitions_are_in_it():
    mixer = make(num_partitions=3)
    assert mixer.state_bytes(10) == mixer.state_bytes(1000) == 4 * (1 + 3) * 2 * 4 * 4
    _, cache = mixer(tokens(1), cache=mixer.init_cache(2, 5))
    written = (cache["routed"] != 0).any((2, 3, 4))
    assert (written.sum(1) == 1).all()
    picked = mixer.router(tokens(1))[:, 0].argmax(-1)
    assert (written.argmax(1) == picked).all()


def test_more_partitions_are_only_a_wider_router():
    def sizes(partitions):
        state = nnx.state(make(num_partitions=partitions), nnx.Param)
        return {path: x.size for path, x in nnx.to_flat_state(state)}

    few, many = sizes(2), sizes(32)
    assert {path for path in few if few[path] != many[path]} == {("router", "kernel")}


@pytest.mark.parametrize("base", ["gla", "gdn"])
def test_one_partition_without_corrections_is_the_shared_branch_twice(base):
    mixer, x = make(base=base, num_partitions=1), tokens()
    for layer in mixer.query_up, mixer.key_up:
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    nnx.update(mixer.routed_gates, nnx.state(mixer.shared_gates))

    def by_hand(mixer, x):
        q, k, v = (y.reshape(2, 9, 2, 4) for y in jnp.split(mixer.qkv(x), 3, -1))
        log_decay, beta = mixer.shared_gates(x)
        if base == "gla":
            keys = jax.nn.softmax(k, -1)
            y = ops.gated_linear_attention(jax.nn.silu(q), keys, jax.nn.silu(v), log_decay)
        else:
            q, k = (l2_norm(jax.nn.silu(y)) for y in (q, k))
            y = ops.gated_delta_rule(q, k, jax.nn.silu(v), beta, log_decay)
        y = mixer.head_norm(2 * y).reshape(2, 9, 8)
        return mixer.out(y * jax.nn.silu(mixer.output_gate(x)))

    got, want = nnx.jit(lambda m, x: m(x))(mixer, x), nnx.jit(by_hand)(mixer, x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_balance():
    mixer, x = make(num_partitions=4, num_write=2), tokens()
    shares = jax.nn.softmax(mixer.router(x), -1)
    order = jnp.argsort(-shares, -1)[..., :2]
    picked = jax.nn.one_hot(order, 4).sum(-2)
    want = 4 / 2 * jnp.sum(shares.mean((0, 1)) * picked.mean((0, 1)))
    np.testing.assert_allclose(mixer.balance_loss(x), want, rtol=1e-5)
    assert (jax.grad(lambda x: mixer.balance_loss(x))(x) != 0).any()


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="base must be 'gla' or 'gdn'"):
        make(base="mamba")
    with pytest.raises(ValueError, match="num_write must be between 1 and 2, got 3"):
        make(num_partitions=2, num_write=3)
