"""From images to tokens and from tokens to one vector."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["conv_tokenizer", "sequence_pool"]


def sequence_pool(x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
    """The mean of tokens under learned attention: `sum_n softmax_n(x_n w + b) x_n`.

    Args:
      x: tokens `[B, N, C]`.
      w, b: weights `[C, 1]` and bias `[1]` of the score.

    Returns:
      `[B, C]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit.

    Source: Hassani et al., 2021, arXiv 2104.05704.
    """
    if x.ndim != 3 or w.shape != (x.shape[-1], 1):
        raise ValueError(f"x must be [B, N, C] and w [C, 1], got {x.shape} and {w.shape}")
    wide = x.astype(jnp.result_type(x, jnp.float32))
    weights = jax.nn.softmax((wide @ w + b)[..., 0], -1)
    return jnp.einsum("bn,bnc->bc", weights, wide).astype(x.dtype)


def conv_tokenizer(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    *,
    stride: int,
    padding: int,
    pool_size: int = 3,
    pool_stride: int = 2,
    pool_padding: int = 1,
) -> jax.Array:
    """Tokens from convolutions: for every kernel a convolution, ReLU and max-pooling.

    Args:
      x: images `[B, Y, X, C]`.
      kernels: `[ky, kx, in, out]` each; the last one's outputs are the channels of a token.
      stride, padding: of the convolutions, along both axes.
      pool_size, pool_stride, pool_padding: of the pooling; its padding never wins.

    Returns:
      `[B, N, C]`: positions row by row.

    Raises:
      ValueError: if shapes do not fit.

    Source: Hassani et al., 2021, arXiv 2104.05704.
    """
    for n, kernel in enumerate(kernels):
        if kernel.ndim != 4 or kernel.shape[2] != x.shape[-1]:
            raise ValueError(
                f"kernels[{n}] must be [ky, kx, {x.shape[-1]}, out], got {list(kernel.shape)}"
            )
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (stride, stride),
            [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = jax.lax.reduce_window(
            jax.nn.relu(x),
            -jnp.inf,
            jax.lax.max,
            (1, pool_size, pool_size, 1),
            (1, pool_stride, pool_stride, 1),
            [(0, 0), (pool_padding, pool_padding), (pool_padding, pool_padding), (0, 0)],
        )
    return x.reshape(x.shape[0], -1, x.shape[-1])
