"""Losses that make a model with one kind of attention follow a model with another."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["attention_distillation"]


def attention_distillation(
    student: jax.Array,
    teacher: jax.Array,
    layer_outputs_s: Sequence[jax.Array],
    layer_outputs_t: Sequence[jax.Array],
    w_kd: float | jax.Array = 0.5,
    w_feat: float | jax.Array = 0.5,
) -> jax.Array:
    """The distance of a student to its teacher, of their outputs and of their attention layers'.

        w_kd mean|student - teacher|^2 + w_feat mean_l mean|layer_s_l - layer_t_l|^2

    It is to be added to the loss of the task. Nothing flows into the teacher.

    Args:
      student, teacher: the outputs of both models, of one shape.
      layer_outputs_s, layer_outputs_t: the outputs of their attention layers in order, of one
        shape in each layer.
      w_kd, w_feat: weights of the two terms.

    Returns:
      A number, in float32 or better.

    Raises:
      ValueError: if shapes or numbers of layers differ, or there is no layer.

    Source: Liu et al., LinFusion, 2024, arXiv 2409.02097.
    """
    count = len(layer_outputs_s)
    if not count or len(layer_outputs_t) != count:
        raise ValueError(
            f"layer_outputs_s and layer_outputs_t must be of the same layers, at least one, "
            f"got {count} and {len(layer_outputs_t)}"
        )
    outputs = _distance("teacher", student, teacher)
    layers = (
        _distance(f"layer_outputs_t[{n}]", *pair)
        for n, pair in enumerate(zip(layer_outputs_s, layer_outputs_t))
    )
    return w_kd * outputs + w_feat * sum(layers) / count


def _distance(name, student, teacher):
    if student.shape != teacher.shape:
        raise ValueError(f"{name} must have the student's shape {student.shape}: {teacher.shape}")
    wide = jnp.result_type(jnp.float32, student, teacher)
    fixed = jax.lax.stop_gradient(teacher).astype(wide)
    return jnp.mean(jnp.square(student.astype(wide) - fixed))
