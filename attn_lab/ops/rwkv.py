"""Averages of values by decaying exponentials of keys, without queries."""

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import diagonal_recurrence
from attn_kernels.recurrence.segments import boundaries
from attn_lab.ops.running import LOWEST

__all__ = ["wkv"]

WKVState = tuple[jax.Array, jax.Array, jax.Array]


def wkv(
    k: jax.Array,
    v: jax.Array,
    time_decay: jax.Array,
    time_first: jax.Array,
    *,
    initial_state: WKVState | None = None,
    return_state: bool = False,
    segment_ids: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, WKVState]:
    """Averages of values so far, weighted by decaying exponentials of keys, a channel at a time.

        o_t = (sum_{s<t} e^{k_s - (t-1-s) w} v_s + e^{u + k_t} v_t) / (the same without v)

    with `w = exp(time_decay)` and `u = time_first`. The maximum of the exponents is a constant to
    derivatives: ratios of the sums do not have it.

    Args:
      k, v: `[B, T, C]`.
      time_decay, time_first: `[C]`.
      initial_state: from an earlier call, whose positions these follow.
      return_state: whether to return the state as well.
      segment_ids: integers `[B, T]`: sums start anew where the id changes; positions of negative
        ids are not summed.

    Returns:
      `[B, T, C]` in the dtype of v; with `return_state` also `(a, b, m)`, each `[B, C]` in float32
      or better: the sums with and without values in units of `e^m`, and m, the largest exponent.
      Before any position a and b are 0 and m is very low.

    Raises:
      ValueError: if shapes do not fit.

    Source: Peng et al., RWKV, 2023, arXiv 2305.13048.
    """
    if k.ndim != 3 or k.shape != v.shape:
        raise ValueError(f"k and v must be [B, T, C], got {list(k.shape)} and {list(v.shape)}")
    for name, a in (("time_decay", time_decay), ("time_first", time_first)):
        if a.shape != k.shape[2:]:
            raise ValueError(f"{name} must be [C] = {list(k.shape[2:])}, got {list(a.shape)}")
    dtype, wide = v.dtype, jnp.result_type(jnp.float32, k, v, time_decay, time_first)
    k, v, time_decay, first = (a.astype(wide) for a in (k, v, time_decay, time_first))
    zero = jnp.zeros_like(k[:, 0])
    a, b, m = (zero, zero, zero + LOWEST) if initial_state is None else initial_state
    m = m.astype(wide)
    step, starts = -jnp.exp(time_decay) + jnp.zeros_like(k), None
    if segment_ids is not None:
        starts, real = (x[..., None] for x in boundaries(segment_ids, k.shape[:2]))
        k = jnp.where(real, k, LOWEST)
        step = jnp.where(starts, -jnp.inf, jnp.where(real, step, 0))
    top = _running_max(k, step, m)
    before = jnp.concatenate([m[:, None], top[:, :-1]], 1)
    weight = jnp.exp(k - top)
    log_decay = before + step - top
    # No clip: where the old maximum stays, the decay is 1 but has the derivative of its step.
    log_decay -= jax.lax.stop_gradient(jnp.maximum(log_decay, 0))
    start = jnp.concatenate([a, b], -1).astype(wide)
    sums, last = diagonal_recurrence(
        jnp.concatenate([weight * v, weight], -1),
        jnp.tile(log_decay, 2)[..., None],
        initial_state=start[..., None],
        return_state=True,
    )
    sums = jnp.concatenate([start[:, None], sums[:, :-1]], 1)
    over, under = jnp.split(sums, 2, -1)
    if starts is not None:
        before = jnp.where(starts, LOWEST, before)
    now = first + k
    unit = jax.lax.stop_gradient(jnp.maximum(before, now))
    old, new = jnp.exp(before - unit), jnp.exp(now - unit)
    total = old * under + new  # 0 if all keys are -inf
    out = (old * over + new * v) / jnp.where(total > 0, total, 1)
    if not return_state:
        return out.astype(dtype)
    last_a, last_b = jnp.split(last[..., 0], 2, -1)
    return out.astype(dtype), (last_a, last_b, top[:, -1])


def _running_max(k, step, start):
    """`m_t = max(m_{t-1} + step_t, k_t)`, a constant to derivatives; never below `LOWEST`."""
    k = jnp.maximum(k, LOWEST).at[:, 0].max(start + step[:, 0])

    def join(x, y):
        return x[0] + y[0], jnp.maximum(x[1] + y[0], y[1])

    return jax.lax.associative_scan(join, jax.lax.stop_gradient((step, k)), axis=1)[1]
