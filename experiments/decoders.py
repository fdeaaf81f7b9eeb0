"""How fast decoders train, variant beside variant: `python -m experiments.decoders`.

A variant is a language model of `config.models` with a mixer, a length and a batch size. All are
compiled at first, then each makes `config.steps` updates from the same parameters on the same
tokens. The workdir receives `cases.jsonl`, a line a variant as it is done, `decoders.json` and
`decoders.png`. The same command continues a run that was interrupted. Presets are in
`experiments/configs/decoders.py`.

The utilisation is the FLOPs that any implementation needs (see `plan.model_flops`) a second, over
those of a large matrix product, which is timed in the same run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from attn_lab.data.text import Text
from attn_lab.training import (
    Optimizer,
    TrainState,
    claim_workdir,
    create_state,
    make_optimizer,
    make_train_step,
    run_main,
)
from attn_lab.training.config import as_dict
from experiments.benchmark import free_bytes, limits
from experiments.compiling import Ready, compile_all, failure
from experiments.language import build_model, load_data, loss_fn
from experiments.plan import model_flops
from experiments.report import Lines

KEY = "model", "variant", "length", "batch_size"


def variants(config: ConfigDict) -> list[tuple[dict[str, Any], ConfigDict]]:
    """What identifies every variant, and its language config.

    Raises:
      ValueError: there is none, a model is unknown, two variants are alike in what identifies them,
        or fewer steps are made than are to be timed.
    """
    found = []
    for variant in config.variants:
        if variant["model"] not in config.models:
            known = ", ".join(config.models)
            raise ValueError(f"model must be one of {known}, got {variant['model']!r}")
        own = ConfigDict(as_dict(config.models[variant["model"]]))
        own.model.mixers = variant["mixer"]
        own.model.mixer_args = ConfigDict(variant["mixer_args"])
        own.update(length=variant["length"], batch_size=variant["batch_size"], steps=config.steps)
        own.update(data_dir=config.data_dir, dtype=config.dtype, seed=config.seed)
        key = dict(zip(KEY, (variant["model"], variant["name"], own.length, own.batch_size)))
        if any(key == other for other, _ in found):
            raise ValueError(f"variants must differ, got two of {key}")
        found.append((key, own))
    if not found:
        raise ValueError("variants must have at least one entry, got none")
    if not 0 < config.untimed < config.steps:
        raise ValueError(f"untimed must be 1 to {config.steps - 1}, got {config.untimed}")
    return found


def optimizer_of(config: ConfigDict) -> Optimizer:
    """The optimizer of a language config."""
    return make_optimizer(config.steps, **config.optimizer.to_dict())


def start(config: ConfigDict) -> tuple[nnx.GraphDef, TrainState]:
    """Static part and first state of a language config, whose `vocab_size` is the model's.

    As one program, all draws of a shape would be one kernel, whose compilation takes minutes.
    """
    return create_state(build_model(config, config.vocab_size), optimizer_of(config))


def lowered(config: ConfigDict) -> jax.stages.Lowered:
    """The program that updates the state."""
    graphdef, state = jax.eval_shape(lambda: start(config))
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.length), jnp.int32)
    step = make_train_step(graphdef, loss_fn, optimizer_of(config), seed=config.seed)
    return step.lower(state, {"inputs": tokens, "targets": tokens})


def trained(
    config: ConfigDict,
    ready: Ready | dict[str, Any],
    work: tuple[int, int],
    text: Text,
    untimed: int,
) -> dict[str, Any]:
    """Losses, speed and memory of a variant.

    Args:
      config: its language config.
      ready: its step, from `compile_all`.
      work: from `model_flops`.
      text: its tokens.
      untimed: how many of the first steps are not timed.

    Returns:
      `error` and `reason` where it does not fit into memory or is refused.
    """
    if isinstance(ready, dict):
        return ready
    needed = ready.total / 1e9
    found = {"gigabytes": needed}
    if needed > free_bytes() / 1e9:
        reason = f"{needed:.1f} GB needed, {free_bytes() / 1e9:.1f} GB free"
        return found | {"error": "out of memory", "reason": reason}
    crops = {"batch_size": config.batch_size, "length": config.length}
    losses = []
    try:
        batches = [text.batch(config.seed, n, **crops) for n in range(config.steps)]
        batches = jax.block_until_ready(jax.device_put(batches))
        _, state = start(config)
        for n, batch in enumerate(batches):
            if n == untimed:
                jax.block_until_ready(state)
                began = time.perf_counter()
            state, metrics = ready.program(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        seconds = (time.perf_counter() - began) / (config.steps - untimed)
    except RuntimeError as error:
        return found | failure(error)
    params, flops = work
    return found | {
        "parameters": params,
        "milliseconds_a_step": 1e3 * seconds,
        "tokens_per_second": config.batch_size * config.length / seconds,
        "flops": flops,
        "teraflops_per_second": flops / seconds / 1e12,
        "losses": [float(loss) for loss in jax.device_get(losses)],
    }


def results(config: ConfigDict, todo: list[tuple[dict, ConfigDict]]) -> Iterator[dict[str, Any]]:
    """Compiles all variants and trains them one by one, as rows."""
    texts = {}
    for _, own in todo:
        place = own.file, own.unit
        text = texts[place] = texts.get(place) or load_data(own)
        multiple = config.vocab_multiple
        own.vocab_size = -(-text.vocab_size // multiple) * multiple
    programs = compile_all(lowered, [own for _, own in todo], config.processes)
    for (key, own), ready in zip(todo, programs):
        text = texts[own.file, own.unit]
        yield key | trained(own, ready, model_flops(own), text, config.untimed)


def differences(rows: list[Mapping[str, Any]], todo: list[tuple[dict, ConfigDict]]) -> list[dict]:
    """How far the losses of variants are from those of another implementation.

    Returns:
      For every variant that differs from an earlier one in its `implementation` alone what
      identifies it, the other's name as `beside`, and the largest difference of their losses as
      `difference`, after update `step`.
    """
    found, first = [], {}
    for key, own in todo:
        row = next(row for row in rows if key.items() <= row.items())
        if "error" in row:
            continue
        same = as_dict(own)
        same["model"]["mixer_args"].pop("implementation", None)
        other = first.setdefault(json.dumps([key["model"], same], sort_keys=True), row)
        if other is row:
            continue
        gaps = [abs(a - b) for a, b in zip(row["losses"], other["losses"])]
        gap = max(gaps)
        found.append(
            key | {"beside": other["variant"], "difference": gap, "step": 1 + gaps.index(gap)}
        )
    return found


def decoders(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Trains all variants of a config, prints a line for each and writes them to the workdir.

    Returns:
      What `decoders.json` holds: device, version, command, limits, config, rows and `differences`.

    Raises:
      FileNotFoundError: a text is not there.
      ValueError: as of `variants`, or the workdir holds cases of another config or device; then
        nothing on disk has changed.
    """
    todo = variants(config)
    device = jax.devices()[0].device_kind
    workdir = claim_workdir(workdir, as_dict(config) | {"device": device})
    kept = Lines(workdir / "cases.jsonl")
    if not kept.rows:
        kept.append(limits(config.dtype, config.repeats))
    limit, *rows = kept.rows
    for row in rows:
        print(line_of(row))
    left = [each for each in todo if not any(each[0].items() <= row.items() for row in rows)]
    for row in results(config, left):
        if "error" not in row:
            row["utilisation"] = row["teraflops_per_second"] * 1e12 / limit["flops_per_second"]
        rows.append(row)
        kept.append(row)
        print(line_of(row), flush=True)
    result = {
        "device": device,
        "jax": jax.__version__,
        "command": " ".join(["python -m experiments.decoders", *sys.argv[1:]]),
        "limits": limit,
        "config": as_dict(config),
        "rows": rows,
        "differences": differences(rows, todo),
    }
    for entry in result["differences"]:
        said = "{model} {variant}, length {length:,}: losses within {difference:.2g} of {beside}"
        print(said.format(**entry))
    (workdir / "decoders.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, workdir / "decoders.png")
    return result


def line_of(row: Mapping[str, Any]) -> str:
    """A line on a variant."""
    said = "{model:6} {variant:24} {batch_size:4} x {length:6,}  ".format(**row)
    if "error" in row:
        return f"{said}{row['error']}: {row['reason']}"
    said += "{tokens_per_second:12,.0f} tokens/s  {milliseconds_a_step:9.2f} ms a step  "
    said += "utilisation {utilisation:5.1%}  {gigabytes:5.1f} GB  loss {last:.4f}"
    return said.format(**row, last=row["losses"][-1])


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Losses over steps, and tokens a second over the length."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = [row for row in rows if "error" not in row]
    series: dict[tuple[str, str], dict[int, float]] = {}
    for n, row in enumerate(rows):
        label = "{model} {variant}, {length:,}".format(**row)
        steps = range(1, 1 + len(row["losses"]))
        style = dict(color=f"C{n % 10}", ls=("-", "--", ":")[n % 3], alpha=0.8)
        left.plot(steps, row["losses"], label=label, **style)
        own = series.setdefault((row["model"], row["variant"]), {})
        own[row["length"]] = row["tokens_per_second"]
    for n, (name, rates) in enumerate(series.items()):
        style = dict(color=f"C{n % 10}", marker="osD^vPX*"[n % 8], alpha=0.8)
        right.plot(*zip(*sorted(rates.items())), label=" ".join(name), **style)
    lengths = sorted({row["length"] for row in rows})
    right.set(xscale="log", ylim=(0, None), xlabel="length", ylabel="tokens a second")
    right.set_xticks(lengths, [f"{n:,}" for n in lengths])
    right.xaxis.set_minor_formatter("")
    left.set(xlabel="step", ylabel="loss, nats a token")
    for ax in left, right:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        if rows:
            ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_main(decoders, Path(__file__).parent / "configs/decoders.py", "runs/decoders")
