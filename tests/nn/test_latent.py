import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attn_lab import nn

WIDTH = 16


def make(module, **arguments):
    normal = nnx.initializers.normal(0.5)
    return module(WIDTH, rngs=nnx.Rngs(0), kernel_init=normal, **arguments)


def tokens(length=6):
    return jax.random.normal(jax.random.key(length), (2, length, WIDTH))


run = nnx.jit(lambda mixer, x, **keywords: mixer(x, **keywords))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_latent_attention_keeps_a_latent_and_a_rotary_key():
    mixer = make(nn.MultiHeadLatentAttention, kv_rank=5, rope_dim=6, value_dim=3)
    assert mixer.state_bytes(10) == 4 * 10 * (5 + 6)
    x = tokens()
    weights, scores = nnx.jit(lambda mixer: (mixer.weights(x), mixer.scores(x)))(mixer)
    close(weights, jax.nn.softmax(scores, -1))
    latent = mixer.norm(mixer.down(x)[..., :5])
    values = mixer.value_up(latent).reshape(2, 6, 4, 3)
    heads = jnp.einsum("bhts,bshd->bthd", weights, values)
    close(run(mixer, x), mixer.out(heads.reshape(2, 6, 12)))
    both = make(nn.MultiHeadLatentAttention, causal=False)
    assert jnp.isfinite(nnx.jit(lambda both: both.scores(x))(both)).all()
    with pytest.raises(ValueError, match="cache needs causal=True"):
        both(x, cache=both.init_cache(2, 6))


def test_compressed_attention_keeps_a_latent_and_two_steps():
    mixer = make(nn.CompressedConvolutionalAttention, num_kv_heads=2, query_kernel=3)
    assert mixer.head_dim == 2 and mixer.rope_theta is None  # half of 2 channels is no pair
    assert mixer.state_bytes(10) == 4 * (10 * 2 * 2 * 2 + 3 * 6 * 2 + WIDTH)
    turning = make(nn.CompressedConvolutionalAttention, head_dim=4)
    assert turning.rotary_dim == 2


def test_the_temperature_scales_the_scores():
    mixer = make(nn.CompressedConvolutionalAttention)
    scores = nnx.jit(lambda mixer: mixer.scores(tokens()))
    before = scores(mixer)
    mixer.temperature[...] = 3 * mixer.temperature[...]
    close(scores(mixer), 3 * before)
    assert jnp.abs(before[jnp.isfinite(before)]).max() <= 2**0.5 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (nn.MultiHeadLatentAttention, {"rope_dim": 3}, "rope_dim must be even"),
        (nn.MultiHeadLatentAttention, {"num_heads": 3}, "num_heads=3 must divide"),
        (nn.CompressedConvolutionalAttention, {"head_dim": 3}, "must be even, got 1 \\* 3"),
        (nn.CompressedConvolutionalAttention, {"query_kernel": 0}, "query_kernel must be"),
        (nn.CompressedConvolutionalAttention, {"rotary_fraction": 2.0}, "rotary_fraction must be"),
        (nn.CompressedConvolutionalAttention, {"num_kv_heads": 3, "head_dim": 4}, "num_kv_heads"),
    ],
)
def test_errors_name_the_argument(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **arguments)
