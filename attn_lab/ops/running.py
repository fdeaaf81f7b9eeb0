"""Exponentials in running units, so that sums of them neither overflow nor look ahead."""

import jax
import jax.numpy as jnp

from attn_kernels.recurrence.segments import boundaries

__all__ = ["running_exp"]

LOWEST = -1e30  # below all logits; differences of it stay finite


def running_exp(
    x: jax.Array,
    *,
    shared: bool = False,
    peak: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Exponentials in units of the largest so far: `exp(x_t - m_t)` with `m_t = max_{s<=t} x_s`.

    What was summed in older units is brought to the present ones by the decay
    `exp(m_{t-1} - m_t)`. The maximum is a constant to derivatives: ratios of sums do not have it.

    Args:
      x: `[B, T, H, D]`.
      shared: whether the channels of a head share a maximum.
      peak: m before these positions, `[B, 1, H, D]`, or `[B, 1, H, 1]` if shared.
      mask: bool `[B, T]`; where False the exponential is 0 and m stays.
      segment_ids: integers `[B, T]`: m and what was summed are forgotten where the id changes;
        negative ids are as in `mask`.

    Returns:
      The exponentials in the shape of x; the log decays, and m after the last position, in the
      shapes of m. All are in float32 or better.

    Raises:
      ValueError: if shapes do not fit.
    """
    x = x.astype(jnp.result_type(jnp.float32, x))
    if mask is not None and (mask.shape != x.shape[:2] or mask.dtype != bool):
        raise ValueError(
            f"mask must be bool {list(x.shape[:2])}, got {mask.dtype}{list(mask.shape)}"
        )
    starts, real = None, mask
    if segment_ids is not None:
        starts, real = boundaries(segment_ids, x.shape[:2])
        starts, real = starts[..., None, None], real if mask is None else real & mask
    real = True if real is None else real[..., None, None]
    top = jax.lax.stop_gradient(x.max(-1, keepdims=True) if shared else x)
    top = jnp.where(real, top, LOWEST)
    peak = jnp.full_like(top[:, :1], LOWEST) if peak is None else peak.astype(x.dtype)
    peaks = _running_max(jnp.concatenate([peak, top], 1), starts)
    log_decay = jnp.minimum(peaks[:, :-1] - peaks[:, 1:], 0)
    if starts is not None:
        log_decay = jnp.where(starts, -jnp.inf, log_decay)
    return jnp.exp(jnp.where(real, x - peaks[:, 1:], -jnp.inf)), log_decay, peaks[:, -1:]


def _running_max(x, starts):
    """The greatest x so far along axis 1; the first one is from before, `starts` is of the rest."""
    if starts is None:
        return jax.lax.cummax(x, axis=1)
    starts = jnp.pad(starts, ((0, 0), (1, 0), (0, 0), (0, 0)))

    def join(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    return jax.lax.associative_scan(join, (starts, x), axis=1)[1]
