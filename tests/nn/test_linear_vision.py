"""Modules of images against their operators."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import (
    DualGatedLinearAttention,
    EfficientAttention2d,
    LINAAttention,
    MALABlock2d,
    NormAwareAttention2d,
)
from attn_lab.nn.layers import split_heads
from attn_lab.nn.linear_vision import grid_angles

X = jax.random.normal(jax.random.key(0), (2, 3, 4, 16))
TOKENS = X.reshape(2, 12, 16)


def make(kind, **arguments):
    build = dict(kernel_init=nnx.initializers.normal(0.5), rngs=nnx.Rngs(0))
    return kind(16, **build | arguments)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-5)


def agree(both, module, x=X):
    """`both` gives what a call on x is and what it is to be; compiled as one."""
    close(*nnx.jit(both)(module, x))


def in_heads(x, heads=4):
    return split_heads(x.reshape(2, -1, x.shape[-1]), heads)


def test_angles_of_a_grid_are_row_and_column_times_frequencies_in_pairs():
    angles = grid_angles((2, 3), jnp.array([1.0, 0.1])).reshape(2, 3, 8)
    close(angles[1, 2], jnp.array([1, 1, 0.1, 0.1, 2, 2, 0.2, 0.2]))
    assert not angles[0, 0].any()


def test_efficient_attention_of_an_image_is_added_to_it():
    block = make(EfficientAttention2d, key_channels=8, value_channels=12, num_heads=2)

    def both(block, x):
        parts = jnp.split(block.attention.qkv(x), (8, 16), -1)
        y = ops.efficient_attention(*(in_heads(part, 2) for part in parts))
        return block(x), x + block.attention.out(y.reshape(2, 3, 4, 12))

    agree(both, block)
    agree(lambda block, x: (block(x.swapaxes(1, 2)).swapaxes(1, 2), block(x)), block)


def test_gates_of_tokens_and_a_convolution_of_the_image_alone():
    mixer = make(LINAAttention, num_tokens=12, grid=(2, 5), causal=False, rope_theta=None)
    mixer.key_gate[...] = jnp.arange(48.0).reshape(12, 4) / 9
    mixer.value_gate[...] = jnp.cos(jnp.arange(48.0)).reshape(12, 4)

    def both(mixer, x):
        heads = map(in_heads, jnp.split(mixer.qkv(x), 3, -1))
        y = ops.kv_gated_linear_attention(*heads, mixer.key_gate[...], mixer.value_gate[...])
        local = mixer.conv(x[:, 2:].reshape(2, 2, 5, 16)).reshape(2, 10, 16)
        return mixer(x), mixer.out(y.reshape(x.shape).at[:, 2:].add(local))

    agree(both, mixer, TOKENS)
    with pytest.raises(ValueError, match="must have the 12 tokens of the gates"):
        mixer(TOKENS[:, 1:])


def test_tokens_of_the_image_turn_with_their_row_and_column():
    mixer = make(LINAAttention, num_tokens=12, grid=(2, 5), causal=False)
    x = jnp.ones((1, 12, 1, 8))
    products = jnp.einsum("btd,bsd->ts", *[mixer._turn(x)[:, :, 0]] * 2)[2:, 2:]
    products = products.reshape(2, 5, 2, 5)
    close(products[0, 0, 1, 2], products[0, 2, 1, 4])
    assert abs(products[0, 0, 1, 2] - products[0, 0, 0, 2]) > 0.1
    close(mixer._turn(x)[:, :3], x[:, :3])


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("kind", [MALABlock2d, NormAwareAttention2d])
def test_an_image_attends_with_local_positions_and_a_gate(kind, rotated):
    block = make(kind, rope_theta=100.0 if rotated else None, num_heads=2)
    angles = {}
    if rotated:  # head dimension 8: two frequencies, those of the ends
        angle = grid_angles((3, 4), jnp.array([1.0, 0.01]))
        angles = {"sin": jnp.sin(angle), "cos": jnp.cos(angle)}

    def both(block, x):
        q, k, v, gate = jnp.split(block.project(x), 4, -1)
        heads = in_heads(q, 2), in_heads(k, 2), in_heads(v, 2)
        if kind is MALABlock2d:
            y = ops.magnitude_aware_linear_attention(*heads, **angles).reshape(x.shape)
            want = (y + block.conv(v)) * gate
        else:
            y = ops.norm_aware_linear_attention(*heads, **angles).reshape(x.shape)
            want = block.norm(y + block.conv(v)) * jax.nn.silu(gate)
        return block(x), block.out(want)

    agree(both, block)
    assert block.conv.kernel.shape == (5, 5, 1, 16)


def test_a_dual_gated_block_is_two_residuals():
    block = make(DualGatedLinearAttention, grid=(3, 4))
    assert block.down.kernel.shape == (16, 4)

    def both(block, x):
        u = block.norm(x)
        v = block.up(jax.nn.silu(block.down(u)))
        angle = split_heads(grid_angles((3, 4), 10000 ** -(jnp.arange(4) / 4)), 4)
        parts = map(in_heads, (*jnp.split(block.query_key(u), 2, -1), v))
        y = ops.rotary_linear_attention(*parts, jnp.sin(angle), jnp.cos(angle)).reshape(x.shape)
        middle = x + block.out((y + block.conv(v)) * jax.nn.silu(block.gate(u)))
        hidden = jax.nn.gelu(block.mlp_up(block.mlp_norm(middle)), approximate=False)
        return block(x), middle + block.mlp_down(hidden)

    agree(both, block)


def test_a_closed_gate_leaves_the_image():
    block = make(DualGatedLinearAttention, grid=(3, 4), mlp_ratio=None)
    block.gate.kernel[...] = jnp.zeros((16, 16))
    agree(lambda block, x: (block(x), x), block)
    with pytest.raises(ValueError, match=r"must have the grid \(3, 4\)"):
        block(X[:, :2])


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (LINAAttention, {"num_tokens": 8, "grid": (3, 3), "causal": False}, "num_tokens=8 must"),
        (LINAAttention, {"num_heads": 8, "causal": False}, "a multiple of 4: 2"),
        (MALABlock2d, {"num_heads": 8}, "a multiple of 4: 2"),
        (DualGatedLinearAttention, {"grid": (3, 4), "num_heads": 16}, "of twice num_heads=16"),
    ],
)
def test_errors_name_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)
