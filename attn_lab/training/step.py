"""Train state, train step and evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding

from attn_kernels.parallel import sequence_parallel
from attn_lab.training.losses import Sums
from attn_lab.training.optimizer import Optimizer
from attn_lab.training.sharding import REPLICATED, Rules, gathered, state_sharding

LossFn = Callable[[nnx.Module, Any, nnx.Rngs | None], Sums]


class TrainState(NamedTuple):
    """Everything that training changes: a pytree of arrays.

    `step` counts updates; `params` are the model's `nnx.Param`, `other` its remaining variables
    (such as running statistics), both as nested dictionaries.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    other: Any


def compute_dtype(name: str = "auto") -> jnp.dtype:
    """The dtype to compute in: "auto" is bfloat16 on accelerators and float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def create_state(model: nnx.Module, optimizer: Optimizer) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model into its static part and a fresh train state."""
    graphdef, params, other = split(model)
    # Donation frees the arrays of a state, and the model keeps its own.
    params, other = jax.tree.map(jnp.copy, (params, other))
    return graphdef, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), other)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
    """Static part, parameters and other variables of a model, the last two as dictionaries."""
    graphdef, params, other = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(other)


def on_mesh(
    loss_fn: LossFn,
    mesh: jax.sharding.Mesh,
    rules: Rules = REPLICATED,
    sequence: str = "ring",
    order: str = "contiguous",
) -> LossFn:
    """The loss as the devices of a mesh compute it: the same numbers.

    Parameters that are split over "fsdp" and "seq" are gathered where they are used, so that every
    device computes on its own examples, and attention and recurrences run over the axis "seq".

    Args:
      loss_fn: for `make_train_step` and `evaluate`.
      mesh: from `make_mesh`.
      rules: of the state, by which its parameters are split.
      sequence: "ring", "all_to_all" or "allgather": see `attn_kernels.parallel.sequence_parallel`.
      order: "contiguous", "zigzag" or "striped": see there.
    """
    if mesh.size == 1:
        return loss_fn

    def on(model, batch, rngs):
        params = {
            "/".join(map(str, path)): variable
            for path, variable in nnx.iter_graph(model)
            if isinstance(variable, nnx.Param)
        }
        arrays = {name: variable.get_value() for name, variable in params.items()}
        for name, sharding in state_sharding(arrays, mesh, rules).items():
            params[name].set_metadata(on_get_value=Gather(sharding))
        with sequence_parallel(mesh, sequence, order=order):
            return loss_fn(model, batch, rngs)

    return on


@dataclasses.dataclass(frozen=True)
class Gather:
    """What reading a parameter does: so it is gathered inside a block that is computed again."""

    sharding: NamedSharding

    def __call__(self, variable: nnx.Variable, value: jax.Array) -> jax.Array:
        if value.shape != variable.get_raw_value().shape:  # a part of it
            return value
        # The first changes nothing, and its transpose splits the gradient.
        value = jax.lax.with_sharding_constraint(value, self.sharding)
        return jax.lax.with_sharding_constraint(value, gathered(self.sharding))


def make_train_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn,
    optimizer: Optimizer,
    *,
    seed: int = 0,
    accumulate: int = 1,
    shardings: Any = None,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """One update as a jitted function `(state, batch) -> (state, metrics)` which donates `state`.

    The gradient is that of `sum / weight` of the entry "loss" over the whole batch, whatever the
    number of micro-batches: sums, weights and gradients of the sums are added, then divided. The
    keys of `rngs` are a function of (seed, step, micro-batch).

    Args:
      graphdef: from `create_state`.
      loss_fn: `loss_fn(model, batch, rngs) -> {name: (sum, weight)}`. The weight of the loss may
        not depend on the parameters.
      optimizer: from `make_optimizer`.
      seed: of the random keys.
      accumulate: number of micro-batches, row `i` of the batch going to `i % accumulate`.
      shardings: of the state, from `state_sharding`; None leaves them to the compiler.

    Returns:
      The step. Its metrics are every entry of `loss_fn` divided by its weight, `grad_norm` (before
      clipping), `param_norm` (after the update) and `lr`.
    """

    def gradients(params, other, batch, key):
        def objective(params):
            model = nnx.merge(graphdef, params, other)
            model.train()
            sums = loss_fn(model, batch, nnx.Rngs(key))
            return sums["loss"][0], (sums, split(model)[2])

        (_, (sums, other)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return grads, sums, other

    def accumulated(params, other, batch, key):
        def micro_batches(x):
            if x.shape[0] % accumulate:
                raise ValueError(
                    f"accumulate={accumulate} must divide the batch size, got {x.shape[0]}"
                )
            # Strided rows, so that each device cuts up the rows it already holds.
            return x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)

        def body(carry, inputs):
            totals, other = carry
            micro_batch, index = inputs
            grads, sums, other = gradients(
                params, other, micro_batch, jax.random.fold_in(key, index)
            )
            return (jax.tree.map(jnp.add, totals, (grads, sums)), other), None

        batches = jax.tree.map(micro_batches, batch)
        first = jax.tree.map(lambda x: x[0], batches)
        shapes = jax.eval_shape(lambda *args: gradients(*args)[:2], params, other, first, key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        (totals, other), _ = jax.lax.scan(body, (zeros, other), (batches, jnp.arange(accumulate)))
        return *totals, other

    def train_step(state, batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        compute = gradients if accumulate == 1 else accumulated
        grads, sums, other = compute(state.params, state.other, batch, key)
        weight = sums["loss"][1]
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: total / weight for name, (total, weight) in sums.items()}
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "lr": optimizer.schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, other), metrics

    out_shardings = None if shardings is None else (shardings, None)
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


@partial(jax.jit, static_argnums=(0, 1))
def _evaluation_sums(graphdef, loss_fn, params, other, batch):
    model = nnx.merge(graphdef, params, other)
    model.eval()
    return loss_fn(model, batch, None)


def evaluate(model: nnx.Module, batches: Iterable[Any], loss_fn: LossFn) -> dict[str, float]:
    """Metrics over all batches: the sums of every entry of `loss_fn` over the sums of its weights.

    A metric whose weights add up to 0 is nan. The model is in evaluation mode and `loss_fn`
    receives `rngs=None`. Compiled once for each (structure of the model, `loss_fn`, shape of a
    batch): pass the same function every time.

    Raises:
      ValueError: there is no batch.
    """
    graphdef, params, other = split(model)
    totals: dict[str, np.ndarray] = {}
    pending = None

    def add(sums):
        for name, pair in jax.device_get(sums).items():
            totals[name] = totals.get(name, np.zeros(2)) + np.array(pair, np.float64)

    # One batch stays in flight, so that the device computes while the next is prepared.
    for batch in batches:
        sums = _evaluation_sums(graphdef, loss_fn, params, other, batch)
        if pending is not None:
            add(pending)
        pending = sums
    if pending is None:
        raise ValueError("batches must hold at least one batch")
    add(pending)
    return {
        name: float(total / weight) if weight else float("nan")
        for name, (total, weight) in totals.items()
    }
