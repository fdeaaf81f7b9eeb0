"""Inverses of unit lower triangular matrices, by matrix products alone."""

import jax
import jax.numpy as jnp

from attn_kernels.recurrence.decay import matmul


def unit_lower_inverse(matrix: jax.Array) -> jax.Array:
    """`(I + strictly_lower(matrix))^-1` by halves: `[[P, 0], [-Q B P, Q]]`.

    P and Q are the inverses of the diagonal halves, B is what is below them. It stands in for
    `jax.lax.linalg.triangular_solve`, which on CPU (jaxlib 0.10.2) makes threads of XLA's pool wait
    for other threads of it: two solves at a time, of two layers say, can block each other for ever.

    Args:
      matrix: `[..., C, C]`; the diagonal and what is above it are ignored.

    Returns:
      `[..., C, C]`.
    """
    size = matrix.shape[-1]
    if size == 1:
        return jnp.ones_like(matrix)
    half = -(-size // 2)
    matrix = jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [(0, 2 * half - size)] * 2)
    halves = jnp.stack([matrix[..., :half, :half], matrix[..., half:, half:]])
    first, second = unit_lower_inverse(halves)
    below = -matmul(matmul(second, matrix[..., half:, :half]), first)
    rows = (
        jnp.concatenate([first, jnp.zeros_like(first)], -1),
        jnp.concatenate([below, second], -1),
    )
    return jnp.concatenate(rows, -2)[..., :size, :size]
