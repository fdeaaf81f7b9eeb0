"""Reading a learned bank of memories beside a short convolution."""

import jax
import jax.numpy as jnp

from attn_lab.ops.attention import dot_product_attention
from attn_lab.ops.convolution import short_conv

__all__ = ["gated_associative_memory"]


def gated_associative_memory(
    x: jax.Array,
    memory: jax.Array,
    conv_kernel: jax.Array,
    conv_bias: jax.Array,
    gate_kernel: jax.Array,
    gate_bias: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """A gated short convolution and a gated look-up in a learned memory, added.

        [a, b] = x gate_kernel + gate_bias,  glob = softmax(x memory^T) memory
        out = sigmoid(a) short_conv(x) + sigmoid(b) glob

    Tokens exchange nothing but through the convolution.

    Args:
      x: normalised, `[B, T, C]`.
      memory: `[M, C]`, both keys and values.
      conv_kernel, conv_bias: `[K, C]` and `[C]`, as in `short_conv`.
      gate_kernel, gate_bias: `[C, 2C]` and `[2C]`.
      implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, C]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit.

    Source: Acharya, 2025, arXiv 2509.00605.
    """
    local = short_conv(x, conv_kernel, conv_bias)
    return join_memory(local, x, memory, gate_kernel, gate_bias, implementation)


def join_memory(
    local: jax.Array,
    x: jax.Array,
    memory: jax.Array,
    gate_kernel: jax.Array,
    gate_bias: jax.Array,
    implementation: str | None = None,
) -> jax.Array:
    """`gated_associative_memory` of a convolution that is done, `[B, T, C]`."""
    channels = x.shape[-1]
    wanted = (channels, 2 * channels)
    if memory.ndim != 2 or memory.shape[1] != channels or gate_kernel.shape != wanted:
        raise ValueError(
            f"memory must be [M, {channels}] and gate_kernel {list(wanted)}, "
            f"got {list(memory.shape)} and {list(gate_kernel.shape)}"
        )
    tokens, bank = x.reshape(1, -1, 1, channels), memory[None, :, None].astype(x.dtype)
    glob = dot_product_attention(tokens, bank, bank, scale=1.0, implementation=implementation)
    a, b = jnp.split(jax.nn.sigmoid(x @ gate_kernel + gate_bias), 2, -1)
    return (a * local + b * glob.reshape(x.shape)).astype(x.dtype)
