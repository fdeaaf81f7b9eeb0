"""Causal mixers as linear systems that vary in time, and the maps that they unroll to."""

import math

import jax
import jax.numpy as jnp

from attn_kernels.recurrence import linear_attention, match_heads
from attn_lab import ops

__all__ = ["as_ltv", "dsf_transfer_matrix", "ltv_distance", "ltv_unroll"]


def ltv_unroll(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array | None = None) -> jax.Array:
    """The map of a linear system with diagonal transitions: `y = Phi u`, lower triangular.

        h_t = a_t h_{t-1} + b_t u_t,    y_t = <c_t, h_t> + d_t u_t
        Phi_ts = sum_n c_tn (prod_{s<j<=t} a_jn) b_sn for s <= t, and d_t on the diagonal

    It runs the system on unit inputs, so that zeros, signs and complex numbers in a are exact.

    Args:
      a, b, c: transitions, inputs and outputs, `[B, T, H, N]`.
      d: the direct path `[B, T, H]`; None is 0.

    Returns:
      Phi, `[B, H, T, T]`.

    Raises:
      ValueError: if shapes do not fit.

    Source: Sieber et al., 2024, arXiv 2405.15731.
    """
    for name, x, shape in ("a", a, a.shape), ("b", b, a.shape), ("c", c, a.shape):
        if x.ndim != 4 or x.shape != shape:
            raise ValueError(f"{name} must be [B, T, H, N] as a {a.shape}, got {x.shape}")
    if d is not None and d.shape != a.shape[:3]:
        raise ValueError(f"d must be [B, T, H] = {list(a.shape[:3])}, got {list(d.shape)}")
    batch, length, heads, size = a.shape
    dtype = jnp.result_type(jnp.float32, a, b, c, *(() if d is None else (d,)))
    unit = jnp.eye(length, dtype=dtype)

    def step(state, now):
        a, b, c, u = now
        state = a[..., None] * state + b[..., None] * u
        return state, jnp.einsum("bhn,bhns->bhs", c, state, precision="highest")

    inputs = (jnp.moveaxis(x.astype(dtype), 1, 0) for x in (a, b, c))
    state = jnp.zeros((batch, heads, size, length), dtype)
    _, rows = jax.lax.scan(step, state, (*inputs, unit))
    phi = jnp.moveaxis(rows, 0, 2)
    return phi if d is None else phi + jnp.swapaxes(d, 1, 2)[..., None] * unit


def dsf_transfer_matrix(
    transition: jax.Array, input_map: jax.Array, output_map: jax.Array
) -> jax.Array:
    """`ltv_unroll` of one system: transitions, inputs and outputs `[T, N]` to a map `[T, T]`.

    Source: Sieber et al., 2024, arXiv 2405.15731.
    """
    return ltv_unroll(*(x[None, :, None] for x in (transition, input_map, output_map)))[0, 0]


def as_ltv(
    name: str, **arrays: jax.Array | str | float | None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The system of a mixer: a, b, c `[B, T, H, N]` and d for `ltv_unroll`; Phi acts on its values.

    Args:
      name: "linear", "gla", "retention", "ssd" or "softmax_norm".
      arrays: what the operator of that name takes but its values, with the same defaults:
        "linear": q, k, feature_map, eps: `a = 1, b = phi(k), c = phi(q) / eta` with the normaliser
        `eta_t = sum_{s<=t} <phi(q_t), phi(k_s)> + eps`;
        "softmax_norm": the same arguments and the same map by a recurrence that is normalised as a
        selective state space: `a_t = eta_{t-1} / eta_t, b = phi(k) / eta, c = phi(q)`; `eta`
        `[B, T, H]` may be given;
        "gla": q, k, log_decay, scale; "retention": q, k, log_decay, scale;
        "ssd": dt, a, b, c, d; its values are x, and `b` takes in dt.

    Returns:
      a, b, c, d; d is None but for "ssd" with d.

    Raises:
      ValueError: if the name is unknown.

    Source: Sieber et al., 2024, arXiv 2405.15731.
    """
    if name not in SYSTEMS:
        raise ValueError(f"name must be one of {', '.join(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name](**arrays)


def ltv_distance(m1: jax.Array, m2: jax.Array) -> jax.Array:
    """How far two maps are apart, between 0 and 2: `|m1 - m2| / max(|m1|, |m2|)`, Frobenius norms.

    Args:
      m1, m2: `[..., T, T]`, such as `ltv_unroll` gives.

    Returns:
      `[...]`; 0 where both are 0.
    """
    apart, *sizes = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (m1 - m2, m1, m2))
    size = jnp.maximum(*sizes)
    return apart / jnp.where(size == 0, 1, size)


def _features(q, k, feature_map, eps):
    """Features of queries and keys, and the normaliser of every query."""
    phi = ops.feature_map(feature_map)
    wide = jnp.result_type(jnp.float32, q, k)
    q, k = match_heads(phi(q.astype(wide)), phi(k.astype(wide)))
    eta = linear_attention(q, k, jnp.ones_like(q[..., :1]), scale=1.0)[..., 0] + eps
    return q, k, eta[..., None]


def _linear(q, k, feature_map="elu1", eps=1e-6):
    q, k, eta = _features(q, k, feature_map, eps)
    return jnp.ones_like(q), k, q / eta, None


def _softmax_norm(q, k, feature_map="elu1", eps=1e-6, eta=None):
    q, k, own = _features(q, k, feature_map, eps)
    eta = own if eta is None else eta[..., None]
    before = jnp.concatenate([eta[:, :1], eta[:, :-1]], 1)
    return jnp.broadcast_to(before / eta, k.shape), k / eta, q, None


def _gla(q, k, log_decay, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    q, k, decay = match_heads(scale * q, k, jnp.exp(log_decay))
    return jnp.broadcast_to(decay, k.shape), k, q, None


def _retention(q, k, log_decay=None, scale=None):
    if log_decay is None:
        heads = jnp.arange(max(q.shape[2], k.shape[2]), dtype=jnp.result_type(jnp.float32, q, k))
        log_decay = jnp.log1p(-jnp.exp2(-5 - heads))
    return _gla(q, k, jnp.broadcast_to(log_decay, (*q.shape[:2], *log_decay.shape)), scale)


def _ssd(dt, a, b, c, d=None):
    decay, inputs, outputs = match_heads(jnp.exp(dt * a)[..., None], b, c)
    direct = None if d is None else jnp.broadcast_to(d, decay.shape[:3])
    return jnp.broadcast_to(decay, inputs.shape), dt[..., None] * inputs, outputs, direct


SYSTEMS = {
    "linear": _linear,
    "gla": _gla,
    "retention": _retention,
    "ssd": _ssd,
    "softmax_norm": _softmax_norm,
}
