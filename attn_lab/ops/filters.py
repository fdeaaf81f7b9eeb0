"""Attention as a filter: keys and values as noisy observations of a process in time."""

import dataclasses

import jax
import jax.numpy as jnp

from attn_kernels import attention as engine
from attn_kernels.attention import Mask, ScoreMod, operand
from attn_lab.ops.masks import as_mask

__all__ = ["adaptive_filter_attention"]


def adaptive_filter_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    times: jax.Array,
    mu: jax.Array,
    omega: jax.Array,
    sigma2: jax.Array,
    eta2: jax.Array,
    gamma2: jax.Array,
    nu: jax.Array,
    tau: jax.Array,
    *,
    causal: bool = True,
    robust: bool = True,
    query_times: jax.Array | None = None,
    mask: Mask | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Values carried to the time of the query, weighted by how far their keys are to be trusted.

    With `d = |t_i - t_j|`, `E = exp(mu d)` and the variance of what noise has added on the way,

        V = sigma2 (1 - E^2) / (-2 mu) + eta2 E^2 + gamma2
        R = |q_i - E exp(i omega (t_i - t_j)) k_j|^2 / (nu D V)
        A = softmax_j(tau^2 (-log V - log(1 + R))),    or with -R if not robust
        o_i = sum_j A_ij E_ij exp(i omega (t_i - t_j)) v_j

    Args:
      q: `[B, T, H, D, 2]`: real and imaginary parts.
      k, v: `[B, S, H, D, 2]`.
      times: of the keys, `[S]`, any real numbers.
      mu: decay rates `[H]`, at most 0; at 0 the first term of V is `sigma2 d`.
      omega: angular frequencies `[H, D]`.
      sigma2, eta2, gamma2: variances of the process, of keys and of queries, `[H]`, positive.
      nu, tau: the scale of residuals and the inverse temperature, `[H]`.
      causal: query t sees the keys `j <= t + S - T`, whatever their times.
      robust: whether a large residual costs its logarithm only.
      query_times: of the queries, `[T]`, by default the last T times.
      mask, implementation: as in `dot_product_attention`.

    Returns:
      `[B, T, H, D, 2]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: Attention as an Adaptive Filter, 2025, arXiv 2509.04154.
    """
    for name, x in ("q", q), ("k", k), ("v", v):
        if x.ndim != 5 or x.shape[-1] != 2 or x.shape[2:] != q.shape[2:]:
            raise ValueError(f"{name} must be [B, T, H, D, 2] as q {q.shape}, got {x.shape}")
    length, heads, dim = q.shape[1:4]
    for name, x, shape in (
        ("times", times, (k.shape[1],)),
        ("omega", omega, (heads, dim)),
        *((name, x, (heads,)) for name, x in (("mu", mu), ("sigma2", sigma2), ("eta2", eta2))),
        *((name, x, (heads,)) for name, x in (("gamma2", gamma2), ("nu", nu), ("tau", tau))),
    ):
        if jnp.shape(x) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(jnp.shape(x))}")
    if query_times is None:
        query_times = times[times.shape[0] - length :]
    wide = jnp.result_type(jnp.float32, q, k, v, times, mu, omega)
    times, query_times, omega = (x.astype(wide) for x in (times, query_times, omega))
    still_q = _turned(q, -query_times, omega)
    still_k, still_v = (_turned(x, -times, omega) for x in (k, v))

    spread = dim * jnp.asarray(nu, wide)
    operands = (
        operand(query_times, "q"),
        operand(times, "k"),
        operand(jnp.sum(still_q**2, -1), "bqh"),
        operand(jnp.sum(still_k**2, -1), "bkh"),
        *(operand(jnp.asarray(x, wide), "h") for x in (mu, sigma2, eta2, gamma2, spread, tau)),
    )

    def attend(values, decayed):
        return engine.attention(
            still_q,
            still_k,
            values,
            mask=as_mask(mask, causal),
            score_mod=ScoreMod(_Trust(robust, decayed), operands),
            scale=1.0,
            return_stats=True,
            implementation=implementation,
        )

    # A E is a softmax whose scores have log E in them, times the ratio of the two denominators.
    out, some = attend(still_v, True)
    _, every = attend(jnp.zeros_like(still_v[..., :1]), False)
    there = every > -jnp.inf
    share = jnp.where(there, jnp.exp(jnp.where(there, some - every, 0)), 0)
    out = _turned(_paired(share[..., None] * out), query_times, omega)
    return _paired(out).astype(v.dtype)


@dataclasses.dataclass(frozen=True)
class _Trust:
    """The logarithm of a weight, or of the weight times the decay that its value suffers."""

    robust: bool
    decayed: bool

    def __call__(
        self,
        product,
        b,
        h,
        q_index,
        k_index,
        query_time,
        time,
        query_square,
        square,
        mu,
        sigma2,
        eta2,
        gamma2,
        spread,
        tau,
    ):
        past = jnp.abs(query_time - time)
        decay = jnp.exp(mu * past)
        noise = sigma2 * past * _mean_exp(2 * mu * past) + eta2 * decay**2 + gamma2
        distance = query_square + decay**2 * square - 2 * decay * product
        residual = jnp.maximum(distance, 0) / (spread * noise)  # rounding may be below 0
        doubt = jnp.log(noise) + (jnp.log1p(residual) if self.robust else residual)
        return (mu * past if self.decayed else 0) - tau**2 * doubt


def _mean_exp(x):
    """The mean of exp from 0 to x, `(exp(x) - 1) / x`, of derivatives that do not cancel near 0."""
    near = jnp.abs(x) < 0.01
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7)))))
    far = jnp.where(near, 1, x)
    return jnp.where(near, series, jnp.expm1(far) / far)


def _turned(x, times, omega):
    """`exp(i omega t) x` of `x [B, T, H, D, 2]`, real parts first: `[B, T, H, 2 D]`."""
    angle = times[:, None, None] * omega
    real, imaginary = (x[..., n].astype(omega.dtype) for n in (0, 1))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)


def _paired(x):
    """`[B, T, H, 2 D]` to `[B, T, H, D, 2]`."""
    return jnp.stack(jnp.split(x, 2, -1), -1)
