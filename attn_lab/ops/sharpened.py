"""Linear attention whose directions are sharpened and cleared of what tokens share."""

import jax
import jax.numpy as jnp

from attn_lab.ops.linear import linear_attention

__all__ = ["dynamic_differential_linear_attention", "hard_route", "norm_preserving_power"]

LARGEST = 80.0  # exp of it is finite in float32


def norm_preserving_power(x: jax.Array, gamma: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """A power that sharpens the direction of a rectified vector and keeps its norm.

        P(x) = relu(x)^g / (|relu(x)^g| + eps) |relu(x)|

    Args:
      x: `[..., D]`.
      gamma: g, positive, `[...]`.
      eps: added to the norm of the power; with 0 the norm is kept exactly.

    Returns:
      The shape and dtype of x; 0 where no entry is positive.

    Raises:
      ValueError: if gamma does not have the shape of x without its last axis.

    Source: DyDiLA, 2026, arXiv 2601.13683.
    """
    if jnp.shape(gamma) != x.shape[:-1]:
        raise ValueError(f"gamma must be {list(x.shape[:-1])}, got {list(jnp.shape(gamma))}")
    wide = jnp.result_type(jnp.float32, x, gamma)
    positive, power = jax.nn.relu(x.astype(wide)), gamma.astype(wide)[..., None]
    # in units of the largest entry, which is a constant to derivatives, no power overflows
    unit = jax.lax.stop_gradient(positive.max(-1, keepdims=True))
    unit = jnp.where(unit > 0, unit, 1)
    parts = positive / unit
    raised = jnp.where(parts > 0, jnp.where(parts > 0, parts, 1) ** power, 0)
    floor = eps * jnp.exp(jnp.minimum(-power * jnp.log(unit), LARGEST))
    total = _norm(raised) + floor
    return (raised / jnp.where(total > 0, total, 1) * _norm(parts) * unit).astype(x.dtype)


def hard_route(logits: jax.Array, values: jax.Array) -> jax.Array:
    """The value with the largest logit, whose gradient is that of a softmax mixture.

    Args:
      logits: `[..., N]`.
      values: N numbers `[N]` for all, or vectors `[..., N, C]`.

    Returns:
      `[...]` or `[..., C]`, in the dtype of values.

    Raises:
      ValueError: if shapes do not fit.

    Source: DyDiLA, 2026, arXiv 2601.13683.
    """
    choices = logits.shape[-1]
    if values.shape != (choices,) and values.shape[:-1] != logits.shape:
        raise ValueError(
            f"values must be [{choices}] or {[*logits.shape, 'C']}, got {list(values.shape)}"
        )
    wide = jnp.result_type(jnp.float32, logits, values)
    soft = jax.nn.softmax(logits.astype(wide), -1)
    hard = jax.nn.one_hot(logits.argmax(-1), choices, dtype=wide)
    weights = hard + (soft - jax.lax.stop_gradient(soft))
    spec = "...n,n->..." if values.ndim == 1 else "...n,...nc->...c"
    return jnp.einsum(spec, weights, values.astype(wide), precision="highest").astype(values.dtype)


def dynamic_differential_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_redundant: jax.Array,
    k_redundant: jax.Array,
    gamma_q: jax.Array,
    gamma_k: jax.Array,
    gamma_qr: jax.Array,
    gamma_kr: jax.Array,
    lam_q: jax.Array,
    lam_k: jax.Array,
    *,
    eps: float = 1e-6,
) -> jax.Array:
    """Linear attention of sharpened queries and keys minus predictions of what is redundant.

        Q_t = P(q_t, gamma_q) - lam_q P(q'_t, gamma_qr),    and K_s of k likewise
        o_t = sum_s <Q_t, K_s> v_s

    P is `norm_preserving_power`; nothing divides the sum.

    Args:
      q, q_redundant: q and q', `[B, T, H, D]`.
      k, k_redundant: `[B, S, K, D]`; K divides H.
      v: `[B, S, K, Dv]`.
      gamma_q, gamma_qr, lam_q: exponents and weights `[B, T, H]`.
      gamma_k, gamma_kr, lam_k: `[B, S, K]`.
      eps: as in `norm_preserving_power`.

    Returns:
      `[B, T, H, Dv]` in the dtype of v.

    Raises:
      ValueError: if shapes do not fit.

    Source: DyDiLA, 2026, arXiv 2601.13683.
    """
    wide = jnp.result_type(jnp.float32, q, k, v)

    def difference(name, x, redundant, gamma, gamma_redundant, lam):
        if redundant.shape != x.shape or lam.shape != x.shape[:-1]:
            raise ValueError(
                f"{name}_redundant must be {list(x.shape)} and lam_{name} {list(x.shape[:-1])}, "
                f"got {list(redundant.shape)} and {list(lam.shape)}"
            )
        shared = norm_preserving_power(redundant.astype(wide), gamma_redundant, eps=eps)
        return norm_preserving_power(x.astype(wide), gamma, eps=eps) - lam[..., None] * shared

    return linear_attention(
        difference("q", q, q_redundant, gamma_q, gamma_qr, lam_q),
        difference("k", k, k_redundant, gamma_k, gamma_kr, lam_k),
        v,
        feature_map="identity",
        normalization="none",
    )


def _norm(x):
    """Over the last axis, with the slope 0 at 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
