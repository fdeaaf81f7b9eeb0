import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import ops
from attn_lab.nn import GatedManhattanAttention, GatedSwinRMTBlock, ManhattanAttention, RMTBlock

SMALL = dict(num_heads=2, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.normal(0.5))


def images(rows=3, columns=4, width=8):
    return jax.random.normal(jax.random.key(rows), (2, rows, columns, width))


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("decomposed", [False, True])
def test_attention_is_that_of_its_parts(decomposed):
    mixer = ManhattanAttention(8, decomposed=decomposed, initial=1.0, **SMALL)
    x = images()

    def parts(mixer, x):
        q, k, v = (layer(x) for layer in (mixer.query, mixer.key, mixer.value))
        # channels 2 i and 2 i + 1 turn by the place times 10000^-i, i of 0 and 1
        angle = jnp.arange(12.0).reshape(3, 4, 1) * jnp.array([1.0, 1e-4])
        turn = jnp.exp(1j * angle)[:, :, None]

        def rotated(y):
            pairs = y.reshape(2, 3, 4, 2, 2, 2)
            turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
            return jnp.stack([turned.real, turned.imag], -1).reshape(2, 3, 4, 2, 4)

        decay = jnp.log(1 - 2.0 ** -jnp.array([1.0, 3.0]))
        heads = v.reshape(2, 3, 4, 2, 4)
        y = ops.manhattan_attention(rotated(q), rotated(k), heads, decay, decomposed=decomposed)
        return mixer.out(y.reshape(x.shape) + mixer.local(v))

    close(nnx.jit(lambda m, x: m(x))(mixer, x), nnx.jit(parts)(mixer, x))


def test_the_convolution_is_local_and_of_the_values():
    mixer = ManhattanAttention(8, decomposed=True, **SMALL)
    late = images(7, 7)
    moved = late.at[:, 6, 6].add(1.0)
    change = mixer.local(moved) - mixer.local(late)
    assert (change[:, :4] == 0).all() and (change[:, 4:, 4:] != 0).any()


def test_blocks_add_their_branches():
    x = images()
    block = RMTBlock(8, mlp_ratio=2, layer_scale=0.0, **SMALL)
    close(block(x), x + block.position(x))
    block = RMTBlock(8, mlp_ratio=2, **SMALL)
    first = x + block.position(x)
    second = first + block.mixer(block.mixer_norm(first))
    hidden = jax.nn.gelu(block.up(block.mlp_norm(second)), approximate=False)
    close(block(x), second + block.down(hidden + block.local(hidden)))


def test_every_parameter_learns_and_drop_path_drops_examples():
    block, x = RMTBlock(8, mlp_ratio=1, layer_scale=0.5, drop_path=0.5, **SMALL), images()
    grads = nnx.jit(nnx.grad(lambda block: jnp.sum(jnp.sin(block(x)))))(block)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all(), path
        if path[-2:] != ("key", "bias"):  # one bias for all keys and turns is nearly a constant
            assert (grad[...] != 0).any(), path
    many = jnp.repeat(x[:1], 64, 0)
    y = nnx.jit(lambda block, key: block(many, rngs=nnx.Rngs(dropout=key)))(
        block, jax.random.key(0)
    )
    assert len(np.unique(np.asarray(y).round(4).reshape(64, -1), axis=0)) == 4


def test_bfloat16_and_errors():
    block = RMTBlock(8, dtype=jnp.bfloat16, **SMALL)
    assert block(images().astype(jnp.bfloat16)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="num_heads=2 must leave an even dimension"):
        RMTBlock(6, **SMALL)


@pytest.mark.parametrize("variant", ["retention", "swat"])
def test_gated_windows(variant):
    """Nothing leaves a window but by the convolution, and a closed gate leaves the residual."""
    x = images(6, 6)
    block = GatedSwinRMTBlock(8, variant=variant, window=3, shift=1, mlp_ratio=1, **SMALL)
    grads = nnx.jit(nnx.grad(lambda block: jnp.sum(jnp.sin(block(x)))))(block)
    for path, grad in nnx.to_flat_state(grads):
        assert jnp.isfinite(grad[...]).all(), path
        assert (grad[...] != 0).any() or path[-2:] == ("key", "bias"), path
    mixer = block.mixer
    if variant == "retention":
        mixer.local.kernel[...] = jnp.zeros_like(mixer.local.kernel[...])
    slopes = nnx.jit(lambda m, x: jax.jacrev(lambda x: m(x)[0, 2, 2].sum())(x))(mixer, x)
    assert (slopes[0, 1:4, 1:4] != 0).any(-1).all()
    inside = jnp.zeros((6, 6), bool).at[1:4, 1:4].set(True)
    assert (slopes[0, ~inside] == 0).all()
    gate = mixer.gate
    gate.kernel[...], gate.bias[...] = 0 * gate.kernel[...], 0 * gate.bias[...] - 1e4
    close(mixer(x), jnp.broadcast_to(mixer.out.bias[...], x.shape))


def test_a_window_as_large_as_the_grid_is_none():
    plain = GatedManhattanAttention(8, window=4, **SMALL)
    x = images()
    v = plain.value(x)
    y = plain._attend(x, v) + plain.local(v)
    close(plain(x), plain.out(y * jax.nn.sigmoid(plain.gate(x))))
    with pytest.raises(ValueError, match="variant must be 'retention' or 'swat'"):
        GatedManhattanAttention(8, variant="both", **SMALL)
    with pytest.raises(ValueError, match="window must be at least 1"):
        GatedManhattanAttention(8, window=0, **SMALL)(x)
