"""AdamW with a learning-rate schedule, gradient clipping and a weight-decay mask."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from attn_lab.training.sharding import path_name

Schedule = Callable[[jax.Array], jax.Array]


class Optimizer(NamedTuple):
    """A gradient transformation (`init`, `update`) and the learning rate it uses at a step."""

    init: Callable
    update: Callable
    schedule: Schedule


def make_schedule(
    steps: int,
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup: int = 0,
    floor: float = 0.0,
    schedule_every: int = 1,
) -> Schedule:
    """Learning rate of update t = 0, 1, ..., steps - 1.

    For t < warmup it is `learning_rate (t + 1) / (warmup + 1)`; afterwards, with the progress
    `u = (t - warmup) / (steps - warmup)` in [0, 1], it is `learning_rate` (constant),
    `floor + (learning_rate - floor) (1 - u)` (linear) or
    `floor + (learning_rate - floor) (1 + cos(pi u)) / 2` (cosine).

    Args:
      steps: number of updates over which the rate falls.
      learning_rate: the peak.
      schedule: "constant", "linear" or "cosine".
      warmup: number of updates with a rising rate.
      floor: the rate at the end.
      schedule_every: the rate changes once in so many updates (the updates of an epoch, for a
        schedule stepped once per epoch): t is rounded down to a multiple of it.

    Raises:
      ValueError: an unknown schedule, or a warm-up that is not shorter than the run.
    """
    shapes = {
        "constant": jnp.zeros_like,
        "linear": lambda u: u,
        "cosine": lambda u: (1 - jnp.cos(jnp.pi * u)) / 2,
    }
    if schedule not in shapes:
        raise ValueError(f"schedule must be one of {', '.join(shapes)}; got {schedule!r}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup must be in [0, steps={steps}); got {warmup}")
    if schedule_every < 1:
        raise ValueError(f"schedule_every must be at least 1; got {schedule_every}")

    def rate(step: jax.Array) -> jax.Array:
        t = (jnp.asarray(step) // schedule_every * schedule_every).astype(jnp.float32)
        u = jnp.clip((t - warmup) / (steps - warmup), 0, 1)
        decayed = learning_rate - (learning_rate - floor) * shapes[schedule](u)
        return jnp.where(t < warmup, learning_rate * (t + 1) / (warmup + 1), decayed)

    return rate


def decay_mask(params: Any, decay: str) -> Any:
    """Booleans of the structure of `params`: which arrays weight decay shrinks.

    `decay` is "matrices" (arrays with two or more axes) or a regular expression searched in the
    path of the parameter, such as `layers/0/mixer/query/kernel`.
    """

    def chosen(path, leaf):
        if decay == "matrices":
            return jnp.ndim(leaf) >= 2
        return re.search(decay, path_name(path)) is not None

    return jax.tree_util.tree_map_with_path(chosen, params)


def make_optimizer(
    steps: int,
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup: int = 0,
    floor: float = 0.0,
    schedule_every: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = ".*",
    clip: float | None = None,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101), decoupled decay scaled by the rate.

    Args:
      steps: number of updates of the run, for the schedule.
      learning_rate, schedule, warmup, floor, schedule_every: see `make_schedule`.
      betas, eps: of Adam.
      weight_decay: w in `p <- p - rate (adam(g) + w p)`.
      decay: what decays: a regular expression or "matrices", see `decay_mask`.
      clip: the gradient is scaled down to this global norm; None leaves it.
    """
    rate = make_schedule(
        steps,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        floor=floor,
        schedule_every=schedule_every,
    )
    b1, b2 = betas
    transform = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            rate,
            b1=b1,
            b2=b2,
            eps=eps,
            weight_decay=weight_decay,
            mask=lambda params: decay_mask(params, decay),
        ),
    )
    return Optimizer(transform.init, transform.update, rate)
