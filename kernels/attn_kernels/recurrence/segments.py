"""Documents packed into one row, and padding, as decays and writes of a recurrence."""

import jax
import jax.numpy as jnp


def boundaries(segment_ids: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, jax.Array]:
    """Where a segment starts after another one, and which positions are not padding.

    Args:
      segment_ids: integers `[B, T]`, negative for padding.
      shape: B and T, for the message.

    Returns:
      Two arrays of booleans `[B, T]`.

    Raises:
      ValueError: if they are not integers of that shape.
    """
    if segment_ids.shape != shape or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(
            f"segment_ids must be integers [B, T] = {list(shape)}, "
            f"got {segment_ids.dtype}{list(segment_ids.shape)}"
        )
    real = segment_ids >= 0
    place = jax.lax.cummax(jnp.where(real, jnp.arange(shape[1]), -1), 1)
    before = jnp.pad(place[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    last = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), 1)
    return real & (before >= 0) & (segment_ids != last), real


def apart(segment_ids, q, k, v, log_decay, beta):
    """The arrays of `linear_attention`, `[B, T, H, ...]`, such that segments do not mix."""
    starts, real = (x[..., None, None] for x in boundaries(segment_ids, q.shape[:2]))
    q, k, v = (jnp.where(real, x, 0) for x in (q, k, v))
    return q, k, v, jnp.where(starts, -jnp.inf, jnp.where(real, log_decay, 0)), beta
