"""Who can recall? Token mixers on multi-query associative recall, side by side.

    python -m experiments.recall [--config=FILE[:PRESET]] [--config.KEY=VALUE] [--workdir=DIR]

trains every mixer at every width and learning rate of the config, prints a table, and leaves
`recall.png` (accuracy over steps; best accuracy against the size of the state), `results.json` and,
for the best run, `result.json` in the workdir. Every run has a folder of its own there; the same
command continues what was interrupted. The presets are in `experiments/configs/recall.py`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from attn_lab.data.order import Rows, epoch_indices, steps_per_epoch
from attn_lab.models import DecoderLM
from attn_lab.tasks import mqar
from attn_lab.training import (
    Result,
    claim_workdir,
    compute_dtype,
    cross_entropy,
    fit,
    make_optimizer,
    run_main,
)


class Part(NamedTuple):
    """Examples of one length and number of pairs: where their labels are, and which."""

    length: int
    pairs: int
    inputs: np.ndarray
    at: np.ndarray
    targets: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.length}_{self.pairs}"

    def take(self, indices: np.ndarray | slice) -> dict[str, np.ndarray]:
        return {name: getattr(self, name)[indices] for name in ("inputs", "at", "targets")}

    def take_from(self, indices: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        return self.take(indices[rows])


class Run(NamedTuple):
    """One point of the sweep and, once it is done, what came out."""

    mixer: str
    width: int
    learning_rate: float
    state_bytes: int
    accuracy: float
    steps: int
    curve: list[tuple[int, float]]
    by_part: dict[str, float]

    @property
    def name(self) -> str:
        return run_name(self.mixer, self.width, self.learning_rate)


def run_name(mixer: str, width: int, learning_rate: float) -> str:
    return f"{mixer}-{width}-{learning_rate:.2e}"


def make_parts(config: ConfigDict, split: str) -> list[Part]:
    """The finite set of examples of a split, `config[split]` saying (length, pairs, examples)."""
    key = jax.random.fold_in(jax.random.key(config.seed), {"train": 0, "test": 1}[split])
    parts = []
    for n, (length, pairs, examples) in enumerate(config[split]):
        settings = dict(seq_len=length, num_kv_pairs=pairs, **config.task.to_dict())
        chunks = []
        for start in range(0, examples, 10_000):
            count = min(10_000, examples - start)
            chunk = mqar(jax.random.fold_in(jax.random.fold_in(key, n), start), count, **settings)
            chunks.append(jax.device_get(chunk))
        inputs, targets = (np.concatenate([c[k] for c in chunks]) for k in ("inputs", "targets"))
        at = np.argsort(targets < 0, axis=1, kind="stable")[:, :pairs].astype(np.int32)
        parts.append(Part(length, pairs, inputs, at, np.take_along_axis(targets, at, 1)))
    return parts


def train_batch(config: ConfigDict, parts: Sequence[Part], step: int) -> Rows:
    """Batch `step`: an epoch goes through the parts in order, each shuffled anew."""
    counts = [steps_per_epoch(len(part.inputs), config.batch_size) for part in parts]
    epoch, rest = divmod(step, sum(counts))
    for n, (part, count) in enumerate(zip(parts, counts)):
        if rest < count:
            seed = config.seed * len(parts) + n
            size = len(part.inputs)
            chosen = epoch_indices(seed, epoch * count + rest, config.batch_size, size)
            return Rows(config.batch_size, functools.partial(part.take_from, chosen))
        rest -= count
    raise AssertionError("an epoch has no further step")


def test_batches(config: ConfigDict, part: Part, step: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, len(part.inputs), config.test_batch_size):
        yield part.take(slice(start, start + config.test_batch_size))


def loss_fn(model: DecoderLM, batch: Mapping[str, jax.Array], rngs: nnx.Rngs | None):
    """Cross-entropy at the labelled positions alone; logits elsewhere are never computed."""
    logits, _ = model(batch["inputs"], at=batch["at"], rngs=rngs)
    return cross_entropy(logits, batch["targets"])


def make_model(config: ConfigDict, mixer: str, width: int) -> DecoderLM:
    """The model of that name in `config.models`, or with the mixer of that name.

    Raises:
      ValueError: if there is neither, or the width does not fit.
    """
    named = config.models.to_dict()
    settings = {"mixers": mixer, **config.model.to_dict(), **named.get(mixer, {})}
    settings.pop("widths", None)
    return DecoderLM(
        vocab_size=config.task.vocab,
        width=width,
        max_len=max(length for length, *_ in (*config.train, *config.test)),
        dtype=compute_dtype(config.dtype),
        **settings,
        rngs=nnx.Rngs(config.seed),
    )


def headline(row: Mapping[str, float], parts: Sequence[Part]) -> float:
    """Accuracy over all test examples."""
    sizes = [len(part.inputs) for part in parts]
    return float(np.average([row[f"{part.name}/accuracy"] for part in parts], weights=sizes))


def train_one(
    config: ConfigDict,
    point: tuple[str, int, float],
    train_parts: Sequence[Part],
    test_parts: Sequence[Part],
    workdir: Path,
) -> Run:
    """One run of the sweep, in a folder of its own."""
    mixer, width, learning_rate = point
    model = make_model(config, mixer, width)
    epoch = sum(steps_per_epoch(len(part.inputs), config.batch_size) for part in train_parts)
    steps = config.epochs * epoch or config.steps
    every = config.eval_every or epoch
    optimizer = config.optimizer.to_dict()
    if optimizer["schedule"] == "cosine":
        optimizer["schedule_every"] = epoch
    result: Result = fit(
        model,
        loss_fn,
        functools.partial(train_batch, config, train_parts),
        make_optimizer(steps, learning_rate=learning_rate, **optimizer),
        steps=steps,
        seed=config.seed,
        evals={part.name: functools.partial(test_batches, config, part) for part in test_parts},
        workdir=workdir / run_name(*point),
        config=ConfigDict({**config, "run": point}),
        log_every=every,
        eval_every=every,
        checkpoint_every=config.checkpoint_every or every,
        stop=lambda row: headline(row, test_parts) > config.stop_accuracy,
        unit=("examples", config.batch_size),
    )
    rows = [row for row in result.rows if f"{test_parts[0].name}/loss" in row]
    curve = [(int(row["step"]), headline(row, test_parts)) for row in rows]
    best = max(range(len(curve)), key=lambda n: curve[n][1])
    return Run(
        *point,
        state_bytes=model.state_bytes(config.state_length),
        accuracy=curve[best][1],
        steps=result.step,
        curve=curve,
        by_part={part.name: rows[best][f"{part.name}/accuracy"] for part in test_parts},
    )


def sweep_points(config: ConfigDict) -> list[tuple[str, int, float]]:
    """Every (mixer, width, learning rate); the config's widths come before a model's own."""
    return [
        (mixer, width, learning_rate)
        for mixer in config.mixers.split(",")
        for width in config.widths or config.models.get(mixer, {}).get("widths", (64,))
        for learning_rate in config.learning_rates
    ]


def train(config: ConfigDict, workdir: str | Path) -> list[Run]:
    """Runs the sweep, prints the table and writes `results.json` and `recall.png`.

    Raises:
      ValueError: on an unknown mixer, sizes that do not fit, or a workdir of another config; then
        nothing on disk has changed.
    """
    points = sweep_points(config)
    for mixer, width, _ in points:
        nnx.eval_shape(functools.partial(make_model, config, mixer, width))
    parts = make_parts(config, "train"), make_parts(config, "test")
    workdir = claim_workdir(workdir, config)
    runs = []
    for point in points:
        print(f"{run_name(*point)}  ({len(runs) + 1} of {len(points)})", flush=True)
        with jax.default_matmul_precision(config.matmul_precision):
            runs.append(train_one(config, point, *parts, workdir))
        jax.clear_caches()  # a sweep compiles a program a point, and none serves another
    if jax.process_index() == 0:
        print(table(runs))
        rows = [run._asdict() for run in runs]
        (workdir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
        plot(runs, workdir / "recall.png", chance=1 / config.train[0][1])
        print(f"\n{workdir / 'recall.png'}")
    return runs


def best_runs(runs: Iterable[Run]) -> list[Run]:
    """Of every (mixer, width) the run with the best learning rate, in order."""
    best: dict[tuple[str, int], Run] = {}
    for run in runs:
        key = run.mixer, run.width
        if key not in best or run.accuracy > best[key].accuracy:
            best[key] = run
    return list(best.values())


def summarize(runs: Iterable[Run]) -> dict[str, str | float]:
    """The settings of the run with the best accuracy and what came out, as plain numbers."""
    best = max(runs, key=lambda run: run.accuracy)._asdict()
    del best["curve"]
    return best | {f"{part}/accuracy": value for part, value in best.pop("by_part").items()}


def table(runs: Sequence[Run]) -> str:
    """The best run of every mixer and width."""
    pad = max(26, *(len(run.mixer) for run in runs))
    lines = [
        f"\n{'mixer':{pad}} {'width':>5} {'rate':>9} {'state, bytes':>13} {'steps':>6} accuracy"
    ]
    for run in best_runs(runs):
        lines.append(
            f"{run.mixer:{pad}} {run.width:5} {run.learning_rate:9.2e} {run.state_bytes:13,} "
            f"{run.steps:6} {run.accuracy:8.3f}"
        )
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path, chance: float) -> None:
    """Accuracy over steps, and best accuracy against the size of the state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(run.mixer for run in runs))
    columns = math.ceil(len(names) / 16)
    figure = Figure(figsize=(9 + 2 * columns, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for n, name in enumerate(names):
        colour, marker = f"C{n % 10}", "osD^vPX*"[n % 8]
        own = sorted((r for r in best_runs(runs) if r.mixer == name), key=lambda r: r.state_bytes)
        for i, run in enumerate(own):
            curve = zip(*[(0, 0.0), *run.curve])
            left.plot(*curve, color=colour, lw=1.8, alpha=(i + 1) / len(own))
        points = zip(*[(run.state_bytes, run.accuracy) for run in own])
        label = name.replace("_", " ")
        right.plot(*points, color=colour, marker=marker, ms=9, mec="w", alpha=0.9, label=label)
    left.axhline(chance, color="0.5", lw=1, ls="--")
    note = {"color": "0.4", "va": "top", "fontsize": 8, "transform": left.get_yaxis_transform()}
    left.text(0.99, chance - 0.01, "guessing among the values seen", ha="right", **note)
    left.set(xlabel="step", ylabel="accuracy", ylim=(0, 1.03), title="Recall while training")
    sizes = [run.state_bytes for run in runs]
    right.set(xscale="log", xlim=(min(sizes) / 3, max(sizes) * 3))
    right.xaxis.set_minor_formatter("")
    right.set(xlabel="state for decoding, bytes", title="Best recall against memory")
    small = "medium" if columns == 1 else "small"
    beside = dict(loc="center left", bbox_to_anchor=(1, 0.5), ncols=columns)
    right.legend(frameon=False, fontsize=small, **beside)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    config_file = Path(__file__).parent / "configs/recall.py"
    run_main(lambda *arguments: summarize(train(*arguments)), config_file, "runs/recall")
