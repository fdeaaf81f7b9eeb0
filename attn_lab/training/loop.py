"""The training loop: restore, train, log, evaluate, checkpoint, stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from flax import nnx

from attn_lab.training.checkpoint import Checkpoints
from attn_lab.training.config import claim_workdir
from attn_lab.training.metrics import MetricsFile
from attn_lab.training.optimizer import Optimizer
from attn_lab.training.progress import Progress
from attn_lab.training.sharding import (
    REPLICATED,
    Rules,
    make_mesh,
    shard_batch,
    state_sharding,
)
from attn_lab.training.step import (
    LossFn,
    create_state,
    evaluate,
    make_train_step,
    on_mesh,
)

MAX_PENDING = 64
MUST_BE_FINITE = ("loss", "grad_norm", "param_norm")


class Result(NamedTuple):
    """What `fit` returns.

    `model` is the trained module, `step` the number of updates it has seen, `rows` the metrics
    logged (dictionaries with a `step`, as in `metrics.jsonl`), `timing` the wall-clock rows.
    """

    model: nnx.Module
    step: int
    rows: list[dict[str, float]]
    timing: list[dict[str, float]]


def fit(
    model: nnx.Module,
    loss_fn: LossFn,
    batch: Callable[[int], Any],
    optimizer: Optimizer,
    *,
    steps: int,
    seed: int = 0,
    evals: Mapping[str, Callable[[int], Iterable[Any]]] | None = None,
    workdir: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    log_every: int = 50,
    eval_every: int = 0,
    checkpoint_every: int = 0,
    keep: int = 2,
    stop: Callable[[dict[str, float]], bool] | None = None,
    accumulate: int = 1,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = REPLICATED,
    sequence: str = "ring",
    order: str = "contiguous",
    unit: tuple[str, int] | None = None,
    progress_seconds: float = 5.0,
) -> Result:
    """Trains a model for `steps` updates, from the newest good checkpoint if there is one.

    Everything random is a function of (seed, step), so a run that was killed and is started again
    ends with the numbers of one that was not. `metrics.jsonl` holds nothing that depends on the
    clock and is equal byte for byte; rates and seconds go to `timing.jsonl`.

    Args:
      model: an `nnx.Module`; it is not changed, the trained one is in the result.
      loss_fn: `loss_fn(model, batch, rngs) -> {name: (sum, weight)}` with scalar sums and weights;
        the loss is `sum / weight` of the entry "loss", and every other entry is a metric averaged
        likewise. `rngs` is an `nnx.Rngs` in training and None in evaluation. See
        `losses.cross_entropy`.
      batch: `batch(step)` gives the batch of update `step` = 0, 1, ...: a pytree of arrays whose
        first axis is the batch, or `attn_lab.data.Rows` of such; with the same step it gives the
        same batch.
      optimizer: from `make_optimizer`.
      steps: total number of updates.
      seed: of the dropout (and any other) keys that `loss_fn` receives.
      evals: `{name: batches}`, where `batches(step)` gives the batches on which the metrics
        `name/loss`, ... are computed after update `step`.
      workdir: where `config.json`, `metrics.jsonl`, `timing.jsonl` and `checkpoints/` go. None
        writes nothing.
      config: what `config.json` records: a (nested) mapping. A workdir which holds another
        config is refused.
      log_every: updates between rows of `train/loss`, `train/grad_norm`, `train/lr`, ... A row
        holds the metrics of that update alone.
      eval_every: updates between evaluations; 0 evaluates after the last update only.
      checkpoint_every: updates between checkpoints; 0 saves after the last update only. SIGTERM
        saves too, then exits with status 143.
      keep: number of checkpoints kept.
      stop: `stop(row)` is called with every row that has evaluations; True ends the run.
      accumulate: micro-batches per update; it divides the batch size.
      mesh: from `make_mesh`; None puts all devices on the axis "data".
      rules: sharding rules of the state, see `sharding.state_sharding`.
      sequence, order: how sequences are shared where the mesh has an axis "seq" above 1, see
        `step.on_mesh`.
      unit: what one update processes, such as `("tokens", 768)`, for the rates shown.
      progress_seconds: time between progress lines; 0 prints none.

    Returns:
      A `Result`.

    Raises:
      ValueError: the workdir holds another config, or a batch that does not divide.
      FloatingPointError: a loss, gradient or parameter is not finite; names the step. Checkpoints
        on disk are from before it.
    """
    mesh = make_mesh() if mesh is None else mesh
    loss_fn = on_mesh(loss_fn, mesh, rules, sequence, order)
    evals = evals or {}
    graphdef, state = create_state(model, optimizer)
    shardings = state_sharding(state, mesh, rules)
    state = jax.device_put(state, shardings)
    train_step = make_train_step(
        graphdef, loss_fn, optimizer, seed=seed, accumulate=accumulate, shardings=shardings
    )
    # Tracing finds shapes that do not fit before anything is written.
    jax.eval_shape(train_step, state, shard_batch(batch(0), mesh))
    checkpoints = None
    if workdir is not None:
        if config is None:
            raise ValueError("config must be given with a workdir, which records it")
        workdir = claim_workdir(workdir, config)
        checkpoints = Checkpoints(workdir / "checkpoints", keep)
        state = checkpoints.restore(state) or state
    step = int(state.step)
    lead = jax.process_index() == 0
    metrics = MetricsFile(workdir and workdir / "metrics.jsonl", step, write=lead)
    timing = MetricsFile(workdir and workdir / "timing.jsonl", step, write=lead)
    progress = Progress(steps, unit, progress_seconds if lead else 0)
    pending: list[tuple[int, dict[str, jax.Array]]] = []

    def due(every: int) -> bool:
        return step == steps or (every > 0 and step % every == 0)

    def ended() -> bool:
        if step >= steps:
            return True
        row = metrics.rows[-1] if metrics.rows else {}
        evaluated = any(f"{name}/loss" in row for name in evals)
        return stop is not None and evaluated and stop(row)

    with on_sigterm() as terminated:
        while not ended():
            state, on_device = train_step(state, shard_batch(batch(step), mesh))
            step += 1
            pending.append((step, on_device))
            save = checkpoints is not None and due(checkpoint_every)
            exits = terminated.is_set()
            if checkpoints is not None and jax.process_count() > 1:
                exits = checkpoints.preempted(step)  # all processes leave at the same step
            # Fetching waits for the device, so it is done only when something needs a number.
            needed = due(log_every) or due(eval_every) or save or exits or progress.due()
            if not needed and len(pending) < MAX_PENDING:
                continue
            values = fetch_finite(pending, checkpoints)
            progress.update(step, values)
            row = {}
            if due(log_every):
                row |= {f"train/{name}": value for name, value in values.items()}
                if rates := progress.rates():
                    timing.append({"step": step} | rates)
            with progress.paused():
                if due(eval_every):
                    trained = nnx.merge(graphdef, state.params, state.other)
                    for name, batches in evals.items():
                        placed = (shard_batch(each, mesh) for each in batches(step))
                        for key, value in evaluate(trained, placed, loss_fn).items():
                            row[f"{name}/{key}"] = value
                if row:
                    metrics.append({"step": step} | row)
                if checkpoints is not None and (save or exits or ended()):
                    checkpoints.save(state)
            if exits:
                logging.warning("Told to stop at step %d.", step)
                raise SystemExit(128 + signal.SIGTERM)
    if checkpoints is not None:
        checkpoints.close()
    trained = nnx.merge(graphdef, state.params, state.other)
    return Result(trained, step, metrics.rows, timing.rows)


def fetch_finite(
    pending: list[tuple[int, dict[str, jax.Array]]], checkpoints: Checkpoints | None
) -> dict[str, float]:
    """Empties `pending` and gives the metrics of its last step as numbers.

    Raises:
      FloatingPointError: the loss, gradient or parameters of any of the steps are not finite.
    """
    fetched = jax.device_get(pending)
    pending.clear()
    for step, values in fetched:
        bad = [name for name in MUST_BE_FINITE if not np.isfinite(values[name])]
        if bad:
            kept = checkpoints.newest() if checkpoints is not None else None
            raise FloatingPointError(
                f"{', '.join(bad)} not finite at step {step}; "
                + (f"the newest checkpoint is of step {kept}" if kept else "there is no checkpoint")
            )
    return {name: float(value) for name, value in values.items()}


@contextlib.contextmanager
def on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process (in the main thread only).

    Of several processes JAX itself catches the signal, and tells all of them at the same step.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
