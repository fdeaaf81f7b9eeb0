"""Tuning a recurrent model through its state before the first token."""

import jax
import jax.numpy as jnp

__all__ = ["expand_initial_state", "initial_state_params"]


def initial_state_params(
    rng: jax.Array, num_heads: int, dim_k: int, dim_v: int, *, rank: int = 1, scale: float = 0.02
) -> tuple[jax.Array, jax.Array]:
    """The factors of an initial state of low rank, normal with standard deviation `scale`.

    They are trained alone, by the usual loss on the model's next tokens: Lina-Speech does so by
    Adam with a learning rate of 0.1.

    Args:
      rng: a key.
      num_heads, dim_k, dim_v: of the state `[H, Dk, Dv]`.
      rank: of the state.
      scale: of the factors.

    Returns:
      a `[H, Dk, rank]` and b `[H, rank, Dv]` in float32, for `expand_initial_state`.

    Raises:
      ValueError: if `rank` is not positive.

    Source: Lina-Speech, 2024, arXiv 2410.23320.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    shapes = (num_heads, dim_k, rank), (num_heads, rank, dim_v)
    a, b = (
        scale * jax.random.normal(key, shape, jnp.float32)
        for key, shape in zip(jax.random.split(rng), shapes)
    )
    return a, b


def expand_initial_state(a: jax.Array, b: jax.Array, batch: int) -> jax.Array:
    """The state `a b` of every example: `[B, H, Dk, Dv]`, in float32 or better.

    Args:
      a, b: `[H, Dk, rank]` and `[H, rank, Dv]`; with either 0 a model is as without.
      batch: B.

    Raises:
      ValueError: if shapes do not fit.

    Source: Lina-Speech, 2024, arXiv 2410.23320.
    """
    if a.ndim != 3 or b.ndim != 3 or (a.shape[0], a.shape[2]) != b.shape[:2]:
        raise ValueError(
            f"a and b must be [H, Dk, rank] and [H, rank, Dv], got {a.shape} and {b.shape}"
        )
    wide = jnp.result_type(jnp.float32, a, b)
    state = jnp.matmul(a.astype(wide), b.astype(wide), precision="highest")
    return jnp.broadcast_to(state, (batch, *state.shape))
