"""Sums of log decays, taken over the steps in between: no sum is a difference of two others.

Differences lose the small decays that follow a large one, and turn -inf (forget all) into NaN.
Every array has its steps on axis -2 and its channels, or one for all of them, on axis -1.
"""

import functools

import jax
import jax.numpy as jnp

FORGOTTEN = -120.0  # a log decay whose exponential is 0 in float32

# The state is summed in float32 or better: no rounding of its factors to bfloat16 or TF32.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def since_start(log_decay: jax.Array) -> jax.Array:
    """`sum_{u <= t}` at step t: `[..., C, D]` to `[..., C, D]`."""
    return jnp.cumsum(log_decay, -2)


def until_end(log_decay: jax.Array) -> jax.Array:
    """`sum_{u > s}` at step s: `[..., C, D]` to `[..., C, D]`."""
    later = jnp.concatenate([log_decay[..., 1:, :], jnp.zeros_like(log_decay[..., :1, :])], -2)
    return jax.lax.cumsum(later, later.ndim - 2, reverse=True)


def between(log_decay: jax.Array) -> jax.Array:
    """`sum_{s < u <= t}` for `s <= t`, and -inf for `s > t`: `[..., C, D]` to `[..., C, C, D]`."""
    t, s = jnp.indices(2 * log_decay.shape[-2:-1])[..., None]
    sums = jnp.cumsum(jnp.where(t > s, log_decay[..., None, :], 0), -3)
    return jnp.where(t >= s, sums, -jnp.inf)


def decayed(state: jax.Array, log_decay: jax.Array) -> jax.Array:
    """`exp(log_decay) state`, with no rounding of a factor close to 1 that would pile up over T.

    Args:
      state: `[..., D, Dv]`.
      log_decay: `[..., D]` or `[..., 1]`.
    """
    tiny = log_decay.real > -0.5
    kept = jnp.where(tiny, 1, jnp.exp(log_decay))
    change = jnp.where(tiny, jnp.expm1(log_decay), 0)
    return kept[..., None] * state + change[..., None] * state
