"""Metrics of the synthetic tasks, over the positions whose target is not `IGNORE`."""

import jax
import jax.numpy as jnp

IGNORE = -100


def accuracy(predictions: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over the labelled positions of an example, then mean over the examples that have any.

    Args:
      predictions: class ids `[B, ...]`, or logits `[B, ..., V]` whose argmax is taken.
      targets: int `[B, ...]`; -100 = ignored.

    Returns:
      float32 scalar in `[0, 1]`.

    Raises:
      ValueError: the shapes do not match.
    """
    if predictions.ndim == targets.ndim + 1:
        predictions = predictions.argmax(-1)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions must have the shape of targets, {targets.shape}, with or without a last "
            f"axis of logits; got {predictions.shape}"
        )
    axes = tuple(range(1, targets.ndim))
    labelled = targets != IGNORE
    counts = labelled.sum(axes)
    correct = (labelled & (predictions == targets)).sum(axes)
    per_example = correct / jnp.maximum(counts, 1)
    return per_example.sum() / (counts > 0).sum()


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean of `-log softmax(logits)[target]` over all labelled positions of the batch, in nats.

    Args:
      logits: `[..., V]`.
      targets: int `[...]`; -100 = ignored.

    Returns:
      Scalar, float32 or better.

    Raises:
      ValueError: the shapes do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits must have the shape of targets, {targets.shape}, and a last axis of classes; "
            f"got {logits.shape}"
        )
    labelled = targets != IGNORE
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    log_probs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_probs, jnp.where(labelled, targets, 0)[..., None], -1)[..., 0]
    return -jnp.where(labelled, chosen, 0).sum() / labelled.sum()
