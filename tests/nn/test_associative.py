import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attn_lab import ops
from attn_lab.nn import GAMBlock, GatedAssociativeMemory

X = jax.random.normal(jax.random.key(0), (2, 7, 4))


def test_the_mixer_is_its_operator():
    mixer = GatedAssociativeMemory(4, num_slots=5, rngs=nnx.Rngs(0))
    parts = mixer.memory, mixer.conv.kernel, mixer.conv.bias, mixer.gates.kernel, mixer.gates.bias
    want = ops.gated_associative_memory(X, *(p[...] for p in parts))
    np.testing.assert_allclose(mixer(X), want, rtol=1e-5, atol=1e-6)


def test_the_block_adds_the_mixer_and_an_mlp():
    block = GAMBlock(4, num_slots=5, mlp_ratio=2, rngs=nnx.Rngs(0))
    assert block.up.kernel.shape == (4, 8)

    @nnx.jit
    def wanted(block):
        y = X + block.mixer(block.mixer_norm(X))
        return y + block.down(jax.nn.gelu(block.up(block.mlp_norm(y)), approximate=False))

    got = nnx.jit(lambda block: block(X))(block)
    np.testing.assert_allclose(got, wanted(block), rtol=1e-5, atol=1e-6)
    slopes = jax.jit(jax.grad(lambda x: block(x)[0, 3].sum()))(X)[0]
    near = (jnp.arange(7) <= 3) & (jnp.arange(7) > 0)
    np.testing.assert_array_equal(slopes.any(-1), near)
