"""Residual updates at a few tokens."""

import jax
import jax.numpy as jnp

__all__ = ["selective_lookup"]


def selective_lookup(
    x: jax.Array, update: jax.Array, scores: jax.Array, *, num_selected: int | None = None
) -> jax.Array:
    """Updates tokens by as much as their scores say, and if asked only those of the largest.

        y_t = x_t + scores_t update_t

    Args:
      x, update: `[B, T, C]`.
      scores: `[B, T]`, in [0, 1].
      num_selected: how many tokens of a sequence are updated, the first of equals; None is all.
        The choice looks at the whole sequence, which is not causal.

    Returns:
      `[B, T, C]` in the dtype of x.

    Raises:
      ValueError: if shapes do not fit or `num_selected` is negative.

    Source: Arora et al., Zoology, 2023, arXiv 2312.04927.
    """
    if x.ndim != 3 or update.shape != x.shape or scores.shape != x.shape[:2]:
        raise ValueError(
            "x and update must be [B, T, C] and scores [B, T], "
            f"got {list(x.shape)}, {list(update.shape)} and {list(scores.shape)}"
        )
    if num_selected is not None and num_selected < 0:
        raise ValueError(f"num_selected must not be negative, got {num_selected}")
    if num_selected is not None and num_selected < x.shape[1]:
        _, best = jax.lax.top_k(scores, num_selected)
        chosen = jnp.zeros(scores.shape, bool).at[jnp.arange(len(x))[:, None], best].set(True)
        scores = jnp.where(chosen, scores, 0)
    wide = jnp.result_type(x, update, scores, jnp.float32)
    return (x + scores[..., None].astype(wide) * update).astype(x.dtype)
