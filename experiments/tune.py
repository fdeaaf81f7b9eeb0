"""Which blocks the kernel of attention for GPUs is fastest with: `python -m experiments.tune`.

Every kernel is timed with all blocks that fit, for every head dimension, dtype and kind of call of
the config, under a causal mask. The workdir receives `cases.jsonl`, a line a case as it is done,
and `blocks.json`, the package's table with the rows of this device replaced. The same command
continues a run that was interrupted. It needs a Hopper GPU.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attn_kernels.attention import ScoreMod, attention, sigmoid
from attn_kernels.attention.blocks import KERNELS, KINDS, TABLE, Blocks, table, using
from attn_kernels.gpu import MULTIPROCESSORS
from attn_lab.ops import sliding_window_mask
from attn_lab.training import claim_workdir, run_main
from attn_lab.training.config import as_dict
from experiments.benchmark import timings
from experiments.compiling import compile_all
from experiments.report import Lines

REGISTERS = {2: 224, 3: 144}  # that numbers may take, by computing warpgroups
KEY = "kernel", "dim", "dtype", "kind"


def candidates(kernel: str, dim: int) -> Iterator[Blocks]:
    """All blocks whose arrays fit into shared memory, and their sums into registers."""
    arrays = 1 if kernel == "outputs" else 2
    sums = 2 if kernel == "column_slopes" and dim <= 128 else 1
    sizes = (64, 128, 192, 256), (1, 2, 3), (2, 3), (0, MULTIPROCESSORS)
    for columns, slots, groups, programs in itertools.product(*sizes):
        blocks = Blocks(64, columns, slots, groups, programs)
        # A thread has half as many numbers of an array in float32 as it has columns.
        held = (sums * dim + arrays * columns + columns // 2) / 2
        if (
            blocks.fits(kernel, (dim, dim))
            and held <= REGISTERS[groups]
            and (slots > 1 or dim > 192)
        ):
            yield blocks


def call_of(config: ConfigDict, kernel: str, kind: str):
    """A function of q, k, v that runs little more than the kernel."""
    parts: dict[str, Any] = {"mask": sliding_window_mask(-1, 0)}
    if kind == "modified":
        parts["score_mod"] = ScoreMod(_capped)
    elif kind == "weights":
        parts["normalizer"] = sigmoid

    def outputs(q, k, v):
        return attention(q, k, v, **parts, implementation="mosaic_gpu")

    def slopes(q, k, v):
        _, pull = jax.vjp(outputs, q, k, v)
        dq, *others = pull(q)
        return dq if kernel == "row_slopes" else others

    return outputs if kernel == "outputs" else slopes


def _capped(score, b, h, q_index, k_index):
    return 30 * jnp.tanh(score / 30) - 0.01 * (q_index - k_index)


def cases(config: ConfigDict) -> list[dict[str, Any]]:
    """All cases of a config.

    Raises:
      ValueError: a kind is unknown.
    """
    for kind in config.kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds must be of {', '.join(KINDS)}, got {kind!r}")
    axes = config.dims, config.dtypes, config.kinds, KERNELS
    return [
        {"kernel": kernel, "dim": dim, "dtype": dtype, "kind": kind, "blocks": blocks}
        for dim, dtype, kind, kernel in itertools.product(*axes)
        for blocks in candidates(kernel, dim)
    ]


def lowered(config: ConfigDict, case: dict[str, Any]) -> jax.stages.Lowered:
    """The case's program."""
    args = jax.eval_shape(functools.partial(inputs, config, case["dim"], case["dtype"]))
    function = call_of(config, case["kernel"], case["kind"])
    with using(**{case["kernel"]: case["blocks"]}):
        return jax.jit(lambda *args: function(*args)).lower(*args)


def inputs(config: ConfigDict, dim: int, dtype: str) -> list[jax.Array]:
    """q, k and v."""
    shape = config.batch, config.length, config.heads, dim
    return [jax.random.normal(jax.random.key(n), shape, dtype) for n in range(3)]


def tune(config: ConfigDict, workdir: str | Path) -> list[dict[str, Any]]:
    """Times all cases and writes the table.

    Returns:
      The rows of `blocks.json`.

    Raises:
      ValueError: a kind is unknown, or the workdir holds cases of another config or device.
    """
    device = jax.devices()[0].device_kind
    todo = cases(config)
    workdir = claim_workdir(workdir, as_dict(config) | {"device": device})
    kept = Lines(workdir / "cases.jsonl")
    done = [{name: row[name] for name in (*KEY, "blocks")} for row in kept.rows]
    for case in todo:
        case["listed"] = [*vars(case["blocks"]).values()]
    todo = [
        case
        for case in todo
        if {name: case[name] for name in KEY} | {"blocks": case["listed"]} not in done
    ]
    # Compilation beside them would disturb the times.
    programs = compile_all(functools.partial(lowered, config), todo, config.processes)
    for case, ready in zip(todo, programs):
        row = {name: case[name] for name in KEY} | {"blocks": case["listed"]}
        if isinstance(ready, dict):
            row |= ready
        else:
            run = functools.partial(ready.program, *inputs(config, case["dim"], case["dtype"]))
            row["milliseconds"] = 1e3 * min(timings(run, config.repeats))
        kept.append(row)
        print(row, flush=True)
    found = [row for row in table() if row["device"] != device] + best(kept.rows, device)
    text = "[\n" + ",\n".join(f" {json.dumps(row)}" for row in found) + "\n]\n"
    (workdir / "blocks.json").write_text(text)
    if config.install:
        TABLE.write_text(text)
    return found


def best(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """Of every kernel, dimension, dtype and kind the fastest row."""
    fastest: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        if "milliseconds" not in row:
            continue
        key = tuple(row[name] for name in KEY)
        if key not in fastest or row["milliseconds"] < fastest[key]["milliseconds"]:
            fastest[key] = row
    return [{"device": device} | fastest[key] for key in sorted(fastest)]


if __name__ == "__main__":
    run_main(tune, Path(__file__).parent / "configs/tune.py", "runs/tune")
