"""Many runs of an experiment: on this machine, some at a time, or on a Ray cluster.

    python -m experiments.sweep --sweep=experiments/configs/sweep.py:recall --workers=2
    python -m experiments.sweep --experiment=recall --config=experiments/configs/recall.py \
        --over=mixers=softmax,delta_rule --over=seed=0,1,2 --workdir=runs/sweep

Each point is a program of its own, started by the command that `command.txt` in its folder says,
with its output in `log.txt`. A run is finished when its `result.json` is there, which it writes at
its very end. The same command starts what is not finished, and runs go on from their checkpoints.
The workdir receives `results.md`, `results.json`, `results.csv` and, with `--plot`, a picture;
`--report` makes them without running anything. `docs/sweep.md` tells the rest.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import csv
import difflib
import fcntl
import hashlib
import importlib.util
import io
import itertools
import json
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import ConfigDict

from attn_lab.training import claim_workdir
from attn_lab.training.config import as_dict, write_json

Point = Mapping[str, Any]


def over(key: str, values: Iterable[Any]) -> list[Point]:
    """A point for every value of one config key."""
    return [{key: value} for value in values]


def product(*factors: Sequence[Point]) -> list[Point]:
    """Every combination of one point of each factor; the last factor varies fastest.

    Raises:
      ValueError: a key is in two factors.
    """
    return [_merge(points) for points in itertools.product(*factors)]


def zip(*factors: Sequence[Point]) -> list[Point]:
    """The first points of all factors together, then the second, and so on.

    Raises:
      ValueError: a key is in two factors, or they differ in length.
    """
    if len({len(points) for points in factors}) > 1:
        raise ValueError(f"zip needs factors of one length; got {[len(f) for f in factors]}")
    return [_merge(points) for points in builtins.zip(*factors)]


def chain(*parts: Sequence[Point]) -> list[Point]:
    """All points, one part after another.

    Raises:
      ValueError: a point is there twice.
    """
    points = [point for part in parts for point in part]
    names = [run_name(point) for point in points]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"point {name} is there twice")
    return points


def sample(points: Sequence[Point], count: int, *, seed: int) -> list[Point]:
    """`count` points drawn without replacement, in their order.

    Raises:
      ValueError: there are fewer.
    """
    if not 0 <= count <= len(points):
        raise ValueError(f"count must be 0 to {len(points)}, the number of points; got {count}")
    return [points[n] for n in sorted(random.Random(seed).sample(range(len(points)), count))]


def _merge(points: Iterable[Point]) -> Point:
    merged: dict[str, Any] = {}
    for point in points:
        for key in point:
            if key in merged:
                raise ValueError(f"key {key} is given twice: {merged[key]!r} and {point[key]!r}")
        merged |= point
    return merged


@dataclass(frozen=True)
class Sweep:
    """Runs of one experiment that differ in some keys of its config.

    Attributes:
      experiment: a module of `experiments`, or any module by its dotted name, that is a program of
        `attn_lab.training.run_main`.
      config: the config file, with `:PRESET` if it has presets.
      points: overrides `{key: value}`, one run each.
      base: overrides of all runs.
    """

    experiment: str
    config: str
    points: Sequence[Point]
    base: Point = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One point of a sweep: its folder, and what a person would type after `python`."""

    name: str
    point: Point
    folder: Path
    command: tuple[str, ...]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"


def run_name(point: Point) -> str:
    """The name of a point's folder, which depends on nothing else."""
    text = ",".join(f"{key}={point[key]}" for key in sorted(point)) or "base"
    safe = re.sub(r"[^\w.=,+()-]", "_", text)
    if safe == text and len(text) <= 120:
        return text
    return f"{safe[:110]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def plan_runs(sweep: Sweep, workdir: str | Path) -> list[Run]:
    """The runs of a sweep; its workdir is claimed for its experiment and config.

    Raises:
      ValueError: there is no such experiment or config key, a value does not fit, a point is there
        twice, or the workdir is another's. Nothing on disk has changed.
    """
    module = sweep.experiment if "." in sweep.experiment else f"experiments.{sweep.experiment}"
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"there is no experiment {sweep.experiment!r}")
    config = _load(sweep.config, "get_config")
    _override(config, sweep.base)
    points = chain(sweep.points)
    for point in points:
        _merge([sweep.base, point])
        _override(config.copy_and_resolve_references(), point)
    claim_workdir(workdir, {"experiment": module, "config": as_dict(config)})
    runs = []
    for point in points:
        folder = Path(workdir) / run_name(point)
        changes = [f"--config.{key}={value}" for key, value in _merge([sweep.base, point]).items()]
        command = ("-m", module, f"--config={sweep.config}", *changes, f"--workdir={folder}")
        runs.append(Run(folder.name, point, folder, command))
    return runs


def _load(spec: str, function: str) -> Any:
    """What a function of a Python file returns, called with what follows `:` in FILE:NAME."""
    file, _, name = spec.partition(":")
    found = runpy.run_path(file)
    if function not in found:
        raise ValueError(f"{file} has no {function}")
    return found[function](*filter(None, [name]))


def _override(config: ConfigDict, point: Point) -> None:
    """Changes a config as the command line would."""
    for key, value in point.items():
        node, path = config, key.split(".")
        for name in path:
            known = list(node) if isinstance(node, ConfigDict) else []
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f'; did you mean "{near[0]}"?' if near else ""
                raise ValueError(f"unknown config key {key}{hint}")
            parent, node = node, node[name]
        try:
            parent[path[-1]] = value
        except (TypeError, ValueError) as error:
            raise ValueError(f"config key {key} cannot be {value!r}: {error}") from error


def start(run: Run, *flags: str, host: int = 0) -> subprocess.Popen | str:
    """Starts a run, unless it is "finished" or "locked": another process has it.

    The lock is a file lock that the run's process inherits and the kernel releases when it ends.
    Each host of a run has its own.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    lock, log = (run.folder / f"{name}{host or ''}" for name in ("lock", "log"))
    with open(lock, "w") as lock, open(log.with_suffix(".txt"), "ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "locked"
        if run.result.exists():
            return "finished"
        (run.folder / "command.txt").write_text(f"python {shlex.join(run.command)}\n")
        return subprocess.Popen(
            [sys.executable, *run.command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,  # an interrupt of the terminal reaches the driver alone
        )


def run_here(runs: Sequence[Run], workers: int = 1) -> dict[str, str]:
    """Runs what is not finished as processes of this machine, at most `workers` at a time.

    Runs that another driver has, or has left behind, are waited for. If this program is told to end
    (SIGTERM or an interrupt), its runs save and end first.

    Returns:
      What went wrong, by the name of the run.
    """
    waiting, running, failed = deque(runs), {}, {}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or running:
            for _ in range(len(waiting)):
                if len(running) >= workers:
                    break
                run = waiting.popleft()
                started = start(run)
                if started == "locked":
                    waiting.append(run)
                elif started != "finished":
                    running[run] = started
                    _say("start", run, len(waiting))
            for run, process in list(running.items()):
                if process.poll() is not None:
                    del running[run]
                    if problem := _problem(run, process.returncode):
                        failed[run.name] = problem
                    _say("failed" if problem else "done", run, len(waiting))
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def run_on_ray(
    runs: Sequence[Run], resources: Mapping[str, float], address: str | None = None
) -> dict[str, str]:
    """Runs what is not finished as tasks of a Ray cluster, which share the workdir's file system.

    A task that was lost with its worker or node is started again by Ray. With the resource of the
    first host of a TPU slice (`TPU-v5litepod-16-head`), a run takes all hosts of a slice.

    Args:
      runs: the runs.
      resources: what each needs, by the names of Ray, such as `{"GPU": 1}`.
      address: the cluster; None is that of `RAY_ADDRESS` or of `ray start` on this machine, or a
        new one here.

    Returns:
      What went wrong, by the name of the run.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is not installed: pip install 'attn_lab[ray]'") from error
    ray.init(address=address, log_to_driver=False)
    special = {name: count for name, count in resources.items() if name not in ("CPU", "GPU")}
    on_slices = any(name.startswith("TPU-") and name.endswith("-head") for name in special)
    task = ray.remote(max_retries=-1)(_attend)
    needs = dict(num_cpus=resources.get("CPU", 1), num_gpus=resources.get("GPU", 0))
    refs = {
        task.options(name=run.name, resources=special, **needs).remote(
            run, os.getcwd(), on_slices
        ): run
        for run in runs
    }
    failed = {}
    while refs:
        (ref,), _ = ray.wait(list(refs), num_returns=1)
        run = refs.pop(ref)
        try:
            problem = ray.get(ref)
        except ray.exceptions.RayError as error:
            problem = str(error).strip().splitlines()[-1]
        if problem:
            failed[run.name] = problem
        _say("failed" if problem else "done", run, len(refs))
    ray.shutdown()
    return failed


def _attend(run: Run, directory: str, on_slice: bool = False, host: int = 0) -> str | None:
    """A task of Ray: a host of a run, in its own process, to the end; returns what went wrong."""
    import ray

    os.chdir(directory)
    others = _other_hosts() if on_slice and host == 0 else []
    flags = ["--distributed"] if others or host else []
    while (process := start(run, *flags, host=host)) == "locked":  # that of a lost task may live
        time.sleep(1)
    if process == "finished":
        return None
    remote = ray.remote(max_retries=-1)(_attend)
    tasks = [
        remote.options(name=f"{run.name} host {n}", resources=needs).remote(run, directory, True, n)
        for n, needs in enumerate(others, 1)
    ]
    try:
        status = process.wait()
        for task in tasks:
            ray.wait([task])
        return _problem(run, status)
    finally:
        process.terminate()


def _other_hosts() -> list[dict[str, float]]:
    """What Ray calls all of each further host of the slice whose first host this is."""
    from ray.util import tpu

    host = {tpu.get_current_pod_name(): 1, "TPU": tpu.get_num_tpu_chips_on_node()}
    return [host] * ((tpu.get_current_pod_worker_count() or 1) - 1)


def _problem(run: Run, status: int) -> str | None:
    if run.result.exists():
        return None
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    lines = (run.folder / "log.txt").read_text(errors="replace").strip().splitlines()
    return f"status {status}: {lines[-1] if lines else 'no output'}"


def _say(what: str, run: Run, left: int) -> None:
    print(f"{what:6} {run.name}  ({left} to go)", flush=True)


def results(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """A row for every run: its name, its point, and its result or None."""
    return [
        {
            "run": run.name,
            "point": dict(run.point),
            "result": json.loads(run.result.read_text()) if run.result.exists() else None,
        }
        for run in runs
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The head and the lines of a table of `results`: overrides, then every metric of any run."""
    keys = list(dict.fromkeys(key for row in rows for key in row["point"]))
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in (row["result"] or {}).items()
        if isinstance(value, (int, float))
    )
    lines = [["run", *keys, *names]]
    for row in rows:
        metrics = row["result"] or {}
        overrides = [str(row["point"].get(key, "")) for key in keys]
        lines.append([row["run"], *overrides, *(_number(metrics.get(name)) for name in names)])
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def report(runs: Sequence[Run], workdir: str | Path) -> list[dict[str, Any]]:
    """Prints the table of a sweep and writes it as markdown, JSON and CSV; returns its rows."""
    rows, workdir = results(runs), Path(workdir)
    head, *lines = table(rows)
    text = "\n".join(
        f"| {' | '.join(line)} |" for line in [head[1:], ["---"] * (len(head) - 1)]
    ) + "".join(f"\n| {' | '.join(line[1:])} |" for line in lines)
    print(text)
    stream = io.StringIO()
    csv.writer(stream).writerows([head, *lines])
    (workdir / "results.md").write_text(text + "\n")
    (workdir / "results.csv").write_text(stream.getvalue())
    write_json(workdir / "results.json", rows)
    return rows


def plot(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], metric: str, path: Path) -> None:
    """The mean of a metric over one hyperparameter or two, as lines and, of two, as a heat map.

    Raises:
      ValueError: no finished run has the key or the metric.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups: dict[tuple, list[float]] = {}
    for row in rows:
        if metric in (row["result"] or {}) and all(key in row["point"] for key in keys):
            values = (row["point"][key] for key in keys)
            place = tuple(tuple(v) if isinstance(v, list) else v for v in values)
            groups.setdefault(place, []).append(row["result"][metric])
    if not groups or not 1 <= len(keys) <= 2:
        known = sorted({name for row in rows for name in (*row["point"], *(row["result"] or ()))})
        raise ValueError(
            f"plot needs one or two hyperparameters and a metric of finished runs; got "
            f"{', '.join(keys)} and {metric}; there are {', '.join(known)}"
        )
    mean = {place: sum(values) / len(values) for place, values in groups.items()}
    xs, ys = _ordered(place[0] for place in mean), _ordered(place[1:] for place in mean)
    figure = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, len(keys), squeeze=False)[0]
    at = {x: n for n, x in enumerate(xs)}
    for y in ys:
        own = [x for x in xs if (x, *y) in mean]
        line = [mean[x, *y] for x in own]
        (drawn,) = left.plot([at[x] for x in own], line, label=", ".join(map(str, y)))
        for x in own:
            values = groups[x, *y]
            left.plot([at[x]] * len(values), values, "o", color=drawn.get_color(), alpha=0.6)
    left.set(xlabel=keys[0], ylabel=metric)
    left.spines[["top", "right"]].set_visible(False)
    left.grid(alpha=0.25)
    for axes in (left, *right):
        axes.set_xticks(range(len(xs)), [str(x) for x in xs])
    for axes in right:
        left.legend(title=keys[1], frameon=False)
        grid = [[mean.get((x, *y), float("nan")) for x in xs] for y in ys]
        figure.colorbar(axes.imshow(grid, origin="lower", aspect="auto"), label=metric)
        axes.set_yticks(range(len(ys)), [str(y) for (y,) in ys])
        axes.set(xlabel=keys[0], ylabel=keys[1])
    figure.savefig(path, dpi=130)


def _ordered(values: Iterable[Any]) -> list[Any]:
    distinct = list(dict.fromkeys(values))
    with contextlib.suppress(TypeError):
        return sorted(distinct)
    return distinct


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse(text: str, flag: str, split: bool) -> tuple[str, Any]:
    key, equals, values = text.partition("=")
    if not equals:
        raise ValueError(f"--{flag} needs KEY=VALUE{',VALUE...' * split}; got {text!r}")
    value = _value(values)
    if not split:
        return key, value
    if isinstance(value, str):
        return key, [_value(part) for part in value.split(",")]
    return key, value if isinstance(value, (tuple, list)) else (value,)


def main(argv: list[str]) -> None:
    """The program: what the flags say."""
    given = flags.FLAGS
    jax.config.update("jax_platforms", "cpu")  # accelerators are for the runs
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}")
        if given.sweep:
            sweep = _load(given.sweep, "get_sweep")
        elif given.experiment and given.config:
            factors = [over(*_parse(text, "over", split=True)) for text in given.over]
            base = _merge([dict([_parse(text, "set", split=False)]) for text in given.set])
            sweep = Sweep(given.experiment, given.config, product(*factors), base)
        else:
            raise ValueError(
                "--sweep=FILE[:NAME], or --experiment=NAME and --config=FILE, is needed"
            )
        if given.plot and not given.metric:
            raise ValueError("--plot needs --metric")
        runs, failed = plan_runs(sweep, given.workdir), {}
        if not given.report and (given.ray or given.ray_address):
            pairs = [text.partition(":") for text in given.resources]
            resources = {name: float(count or 1) for name, _, count in pairs}
            failed = run_on_ray(runs, resources, given.ray_address)
        elif not given.report:
            failed = run_here(runs, given.workers)
        rows = report(runs, given.workdir)
        if given.plot:
            picture = Path(given.workdir) / f"{'_'.join(given.plot)}.png"
            plot(rows, given.plot, given.metric, picture)
            print(picture)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error
    if failed:
        lines = [f"  {name}: {problem}" for name, problem in failed.items()]
        raise SystemExit("\n".join([f"error: {len(failed)} of {len(runs)} runs failed:", *lines]))


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "Python file with get_sweep, with :NAME if it takes one.")
    flags.DEFINE_string("experiment", None, "Experiment of a sweep without a file.")
    flags.DEFINE_string("config", None, "Its config file, with :PRESET.")
    flags.DEFINE_multi_string("over", [], "KEY=VALUE,VALUE...: the sweep is the product of all.")
    flags.DEFINE_multi_string("set", [], "KEY=VALUE of all runs.")
    flags.DEFINE_string("workdir", "runs/sweep", "Where the results go.")
    flags.DEFINE_integer("workers", 1, "Runs at a time on this machine.", lower_bound=1)
    flags.DEFINE_bool("report", False, "Run nothing; report what is there.")
    flags.DEFINE_list("plot", [], "One hyperparameter or two to plot the metric over.")
    flags.DEFINE_string("metric", None, "The metric to plot.")
    flags.DEFINE_bool("ray", False, "Run on the Ray cluster of RAY_ADDRESS, or a new local one.")
    flags.DEFINE_string("ray_address", None, "Run on this Ray cluster.")
    flags.DEFINE_list("resources", [], "NAME:N,... that a run takes on Ray: GPU:1, CPU:4, TPU:4.")
    app.run(main)
