"""Mixing without attention: the planes that tokens span with earlier ones."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["grassmann_mixing", "plucker_coordinates"]


def plucker_coordinates(a: jax.Array, b: jax.Array, *, eps: float = 1e-8) -> jax.Array:
    """The plane that two vectors span, as unit Pluecker coordinates: `p_ij = a_i b_j - a_j b_i`.

    Parallel vectors span none and give 0.

    Args:
      a, b: `[..., r]`.
      eps: p is divided by its norm, or by this if that is larger.

    Returns:
      `[..., r (r - 1) / 2]`, the pairs i < j in order of i, then j.

    Raises:
      ValueError: if r differs or is less than 2.

    Source: arXiv 2512.19428, 2025.
    """
    dim = a.shape[-1]
    if b.shape[-1] != dim or dim < 2:
        raise ValueError(f"a and b must be [..., r] with r > 1, got {a.shape} and {b.shape}")
    i, j = np.triu_indices(dim, 1)
    wide = jnp.result_type(a, b, jnp.float32)
    x, y = a.astype(wide), b.astype(wide)
    p = x[..., i] * y[..., j] - x[..., j] * y[..., i]
    square = jnp.sum(p**2, -1, keepdims=True)
    return (p / jnp.sqrt(jnp.maximum(square, eps**2))).astype(jnp.result_type(a, b))


def grassmann_mixing(
    h: jax.Array,
    w_red: jax.Array,
    b_red: jax.Array,
    w_plu: jax.Array,
    b_plu: jax.Array,
    w_gate: jax.Array,
    b_gate: jax.Array,
    *,
    offsets: Sequence[int] = (1, 2, 4, 8, 12, 16),
    eps: float = 1e-8,
) -> jax.Array:
    """Gates into every token the planes that it spans with some earlier ones: `a h + (1 - a) g`.

    With `z = h w_red + b_red`, g the mean over the offsets d <= t, 0 if there are none:

        g_t = mean_d plucker(z_t, z_{t-d}) w_plu + b_plu,  a_t = sigmoid([h_t, g_t] w_gate + b_gate)

    Args:
      h: `[B, T, C]`.
      w_red, b_red: `[C, r]` and `[r]`.
      w_plu, b_plu: `[r (r - 1) / 2, C]` and `[C]`.
      w_gate, b_gate: `[2C, C]` and `[C]`.
      offsets: distances back, positive.
      eps: as in `plucker_coordinates`.

    Returns:
      `[B, T, C]` in the dtype of h.

    Raises:
      ValueError: if shapes do not fit or an offset is not positive.

    Source: arXiv 2512.19428, 2025.
    """
    if h.ndim != 3 or not h.shape[1]:
        raise ValueError(f"h must be [B, T, C], got {list(h.shape)}")
    if not offsets or min(offsets) < 1:
        raise ValueError(f"offsets must be positive, at least one, got {tuple(offsets)}")
    wide = h.astype(jnp.result_type(h, w_red, jnp.float32))
    z = wide @ w_red + b_red
    seen = jnp.pad(z, ((0, 0), (max(offsets), 0), (0, 0)))
    valid = jnp.arange(h.shape[1])[:, None] >= jnp.array(offsets)
    g = mean_plane(seen, valid, offsets, w_plu, b_plu, eps)
    return gate_in(wide, g, w_gate, b_gate).astype(h.dtype)


def mean_plane(
    seen: jax.Array,
    valid: jax.Array,
    offsets: Sequence[int],
    w_plu: jax.Array,
    b_plu: jax.Array,
    eps: float = 1e-8,
) -> jax.Array:
    """The mean over offsets of the projected planes of tokens and earlier ones.

    Args:
      seen: reduced tokens `[B, P + T, r]`, of which the first P, the largest offset, are past.
      valid: bool `[T, n]` or `[B, T, n]`, for every offset whether it counts.
    """
    past = max(offsets)
    z, length = seen[:, past:], seen.shape[1] - past
    planes = 0
    for n, d in enumerate(offsets):
        plane = plucker_coordinates(z, seen[:, past - d : past - d + length], eps=eps)
        planes += jnp.where(valid[..., n, None], plane, 0)
    count = valid.sum(-1, keepdims=True)
    return jnp.where(count > 0, planes / jnp.maximum(count, 1) @ w_plu + b_plu, 0)


def gate_in(h: jax.Array, g: jax.Array, w_gate: jax.Array, b_gate: jax.Array) -> jax.Array:
    """`a h + (1 - a) g` with `a = sigmoid([h, g] w_gate + b_gate)`."""
    a = jax.nn.sigmoid(jnp.concatenate([h, g], -1) @ w_gate + b_gate)
    return a * h + (1 - a) * g
