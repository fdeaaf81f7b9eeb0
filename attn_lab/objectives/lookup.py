"""Keeping look-ups few."""

import jax
import jax.numpy as jnp


def lookup_penalty(scores: jax.Array, *, num_lookups: float, weight: float = 0.001) -> jax.Array:
    """What more look-ups than wanted cost: `weight relu(mean(scores) - num_lookups / T)`.

    Args:
      scores: of `selective_lookup`, `[B, T]`.
      num_lookups: how many of T tokens may be looked up for nothing.
      weight: of the penalty.

    Returns:
      A scalar in float32 or better.

    Raises:
      ValueError: if scores are not `[B, T]`.

    Source: Arora et al., Zoology, 2023, arXiv 2312.04927.
    """
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores must be [B, T], got {list(scores.shape)}")
    wide = scores.astype(jnp.result_type(scores, jnp.float32))
    return weight * jax.nn.relu(wide.mean() - num_lookups / scores.shape[1])
