"""Losses and metrics as (sum, weight) pairs, which add up over micro-batches, batches and hosts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

Sums = dict[str, tuple[jax.Array, jax.Array]]


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    *,
    ignore: int = -100,
    label_smoothing: float = 0.0,
) -> Sums:
    """Cross-entropy in nats and accuracy, summed over the labelled positions.

    With p = softmax(logits), V classes and smoothing s, a position with target y contributes
    `-(1 - s) log p[y] - s/V sum_v log p[v]`; computed in float32 or better.

    Args:
      logits: `[..., V]`.
      targets: `[...]` integers in `0 .. V - 1`; positions equal to `ignore` do not count.
      ignore: the target of positions without a label.
      label_smoothing: in `[0, 1)`.

    Returns:
      `{"loss": (sum, count), "accuracy": (sum, count)}`.

    Raises:
      ValueError: the shapes of logits and targets do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without its last axis, {logits.shape[:-1]}; "
            f"got {targets.shape}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labelled = targets != ignore
    labels = jnp.where(labelled, targets, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing:
        uniform = -jax.nn.log_softmax(logits).mean(-1)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    count = labelled.sum().astype(logits.dtype)
    correct = (logits.argmax(-1) == labels) & labelled
    return {
        "loss": (jnp.where(labelled, loss, 0).sum(), count),
        "accuracy": (correct.sum().astype(logits.dtype), count),
    }
