"""How long mechanisms take: `python -m experiments.benchmark --family attention`.

Every case (mechanism, implementation, sizes, pass) is timed against the limit of the device, which
is measured in the same run: a large matrix product and a large copy. A mechanism is a row of the
catalogue, or one of `experiments/programs.py`. The workdir receives `cases.jsonl`, a line a case as
it is done, `benchmark.json` and `benchmark.png`. The same command continues a run that was
interrupted. Presets are in `experiments/configs/benchmark.py`.

FLOPs are those of the pairs that the mask allows, bytes those of inputs and outputs alone, and the
fraction of the limit is the least time that the device needs for either, over the time it took.
Printed last is, of mechanisms, how times grow with length and from which length on they are faster
than `config.baseline`; of programs, how fast they are beside other implementations, and how near to
the rate of their plain program.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from attn_lab.catalogue import Mechanism, Sizes, find
from attn_lab.ops import as_mask
from attn_lab.training import claim_workdir, run_main
from attn_lab.training.config import as_dict
from experiments import peers
from experiments.growth import SERIES, growth
from experiments.programs import PROGRAMS, Program, program
from experiments.ratios import ratios

PASSES = "forward", "forward_backward"
CUDNN = "cudnn"
COLUMNS = (
    ("mechanism", "mechanism", "<33", None),
    ("implementation", "implementation", "<14", None),
    ("pass", "pass", "<16", None),
    ("length", "length", ">7", 1),
    ("batch", "batch", ">5", 1),
    ("head_dim", "dim", ">4", 1),
    ("milliseconds", "min, ms", ">10.3f", 1),
    ("median_milliseconds", "median, ms", ">10.3f", 1),
    ("flops", "GFLOP", ">10.3f", 1e9),
    ("bytes", "MB", ">9.2f", 1e6),
    ("temporary_megabytes", "temp, MB", ">10.1f", 1),
    ("teraflops_per_second", "TFLOP/s", ">9.3g", 1),
    ("gigabytes_per_second", "GB/s", ">9.3g", 1),
    ("least_milliseconds", "limit, ms", ">10.3g", 1),
    ("fraction_of_limit", "of limit", ">9.3g", 1),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
      row: the mechanism.
      sizes: its sizes.
      implementation: its name.
      call: a function of arrays and `causal`, or the name of a peer.
      kind: the pass.
    """

    row: Mechanism
    sizes: Sizes
    implementation: str
    call: Any
    kind: str

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        sizes = {"length": self.sizes.T, "batch": self.sizes.B, "heads": self.sizes.H}
        names = {"mechanism": self.row.name, "implementation": self.implementation}
        return names | {"pass": self.kind} | sizes | {"head_dim": self.sizes.D}

    @property
    def of_peer(self) -> bool:
        return isinstance(self.call, str)

    @property
    def backward(self) -> bool:
        return self.kind != PASSES[0]

    @property
    def constants(self) -> tuple[str, ...]:
        """The arguments of which no gradients are taken."""
        return self.row.constants if isinstance(self.row, Program) else ()


def implementations(row: Mechanism, config: ConfigDict) -> dict[str, Any]:
    """The row's implementations by name: functions of arrays and `causal`, or the name of a peer.

    On a GPU and in half precision plain softmax attention also has "cudnn", and so have the
    programs that it can compute. Recurrences and programs have the libraries of `peers` where these
    are installed.
    """
    found = {}
    variants = row.variants
    half = jnp.dtype(config.dtype).itemsize == 2
    fixed = row.fixed if isinstance(row, Program) else row.name == "dot_product_attention"
    if fixed and half and jax.default_backend() == "gpu":
        variants = *variants, {"implementation": CUDNN}
    for variant in variants:
        name = next(iter(variant.values()), row.function.__name__)

        def call(arrays, causal, variant=variant):
            return row.call(arrays, causal=causal, **variant)

        found[name] = call
    if peer := peers.peer_of(row):
        found[peer] = peer
    return found


def groups(config: ConfigDict) -> list[list[Case]]:
    """The cases of a config, those together that have their sizes in common.

    Raises:
      ValueError: a mechanism, an implementation or a pass is unknown.
    """
    if not (config.groups or config.mechanisms) and config.family not in config.families:
        known = ", ".join(config.families)
        raise ValueError(f"family must be one of {known}; got {config.family!r}")
    for name in config.passes:
        if name not in PASSES:
            raise ValueError(f"passes must be of {', '.join(PASSES)}, got {name!r}")
    for name in ("passes",) if config.groups else ("lengths", "passes"):
        if not config[name]:
            raise ValueError(f"{name} must have at least one entry, got none")
    known, missing, found = set(), {}, []
    for group in config.groups or [{"length": length} for length in config.lengths]:
        part = ConfigDict(as_dict(config) | group)
        found.append([])
        own = []
        for name in (part.mechanisms or part.families[part.family]).split(","):
            in_programs = name.split("-")[0] in PROGRAMS
            row = program(name, part.length) if in_programs else find(name)
            own.append((row, implementations(row, part)))
        known |= {name for _, calls in own for name in calls}
        wanted = [name for name in part.implementations.split(",") if name]
        missing |= dict.fromkeys(wanted)
        for row, calls in own:
            sizes = Sizes(
                B=part.batch,
                T=part.length,
                S=part.length,
                H=part.heads,
                K=part.kv_heads,
                D=part.head_dim,
                V=part.head_dim,
            )
            for name, call in calls.items():
                for kind in part.passes if not wanted or name in wanted else ():
                    found[-1].append(Case(row, row.fit(sizes), name, call, kind))
    for name in missing:
        if name not in known:
            needs = {
                CUDNN: "; it needs a GPU, 16 bits and dot_product_attention",
                peers.FLA: "; it needs a GPU, PyTorch, fla-core and a recurrence that it has",
                peers.FLEX: "; it needs a GPU, PyTorch and a program that it has",
            }
            raise ValueError(
                f"implementation {name!r} is not there; choose of {', '.join(sorted(known))}"
                + needs.get(name, "")
            )
    return found


def flops_of(row: Mechanism, sizes: Sizes, causal: bool) -> float:
    """Multiplications and additions of a forward pass over the pairs that are allowed."""
    whole = row.flops(sizes)
    doubled = row.flops(dataclasses.replace(sizes, T=2 * sizes.T, S=2 * sizes.S))
    # Of a T^2 + b T this is a T^2, which a mask makes smaller; recurrences have none.
    of_pairs = (doubled - 2 * whole) / 2
    mask = as_mask(row.settings.get("mask"), causal)
    if mask is None or not of_pairs:
        return float(whole)
    share = float(np.mean(mask.count(sizes.T, sizes.S))) / (sizes.T * sizes.S)
    return whole - (1 - share) * of_pairs


def pattern(config: ConfigDict, row: Mechanism) -> bool:
    """Whether a row is timed in its causal form."""
    return config.causal if config.causal in row.causal else row.causal[0]


def example(config: ConfigDict, case: Case) -> dict[str, jax.Array]:
    """Random arguments of a case."""
    return case.row.example(case.sizes, jax.random.key(0), jnp.dtype(config.dtype))


def compiled(config: ConfigDict, case: Case) -> Any:
    """The program of a case, or why there is none."""
    causal = pattern(config, case.row)

    def forward(arrays):
        return case.call(arrays, causal)

    def both(arrays):
        moving = {name: x for name, x in arrays.items() if name not in case.constants}
        out, pullback = jax.vjp(lambda moving: forward(arrays | moving), moving)
        return out, pullback(out)

    arrays = jax.eval_shape(functools.partial(example, config, case))
    try:
        return jax.jit(both if case.backward else forward).lower(arrays).compile()
    except (RuntimeError, ValueError) as error:
        return failure(error)


def failure(error: Exception) -> dict[str, Any]:
    """What is recorded of a case that has no time."""
    text = str(error)
    full = "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
    reason = text.strip().split("\n")[0][:300]
    return {"error": "out of memory" if full else "refused", "reason": reason}


def work_of(config: ConfigDict, case: Case) -> dict[str, float]:
    """FLOPs and bytes of a forward pass."""
    flops = flops_of(case.row, case.sizes, pattern(config, case.row))
    return {"flops": flops, "bytes": case.row.bytes(case.sizes, config.dtype)}


def measure(config: ConfigDict, case: Case, program: Any) -> dict[str, Any]:
    """Time and memory of a case.

    Args:
      config: of the benchmark.
      case: what to time.
      program: from `compiled`; of a peer a forward pass of ours to compare it with, or None.

    Returns:
      `error` and `reason` where it does not fit into memory or is refused.
    """
    if isinstance(program, dict):
        return program
    memory = {}
    try:
        arrays = example(config, case)
        if case.of_peer:
            timed, memory = peers.prepare(case.row, arrays, case.backward, case.constants, program)
            seconds = timings(timed, config.repeats)
        else:
            temporary = program.memory_analysis().temp_size_in_bytes
            memory["temporary_megabytes"] = temporary / 1e6
            free = free_bytes()
            if temporary > free:
                reason = f"{temporary / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB free"
                return {"error": "out of memory", "reason": reason, **memory}
            seconds = timings(lambda: program(arrays), config.repeats)
    except RuntimeError as error:
        found = failure(error)
        if found["error"] == "refused" and not case.of_peer:
            raise
        return found | memory
    return {
        "milliseconds": 1e3 * min(seconds),
        "median_milliseconds": 1e3 * statistics.median(seconds),
        **memory,
    }


def results(config: ConfigDict, cases: list[Case]) -> Iterator[dict[str, Any]]:
    """Compiles all cases and times them one by one, as measured rows."""
    own = [case for case in cases if not case.of_peer]
    one_of = {case.row.name: case for case in cases}
    # Compilation beside them would disturb the times.
    with ThreadPoolExecutor(config.threads) as pool:
        work = pool.map(functools.partial(work_of, config), one_of.values())
        programs = list(pool.map(functools.partial(compiled, config), own))
        work = dict(zip(one_of, work))
    forward = {c.row.name: p for c, p in zip(own, programs) if not c.backward}
    programs = iter(programs)
    for case in cases:
        if case.of_peer:
            program = forward.get(case.row.name)
            program = None if isinstance(program, dict) else program
        else:
            program = next(programs)
        row = case.key | measure(config, case, program)
        if isinstance(case.row, Program):
            row["plain"] = case.row.plain
        if "error" not in row:
            # A backward pass computes scores again and has four products more: 5 beside the 2 of
            # forward.
            flops, moved = work[case.row.name].values()
            row["flops"] = flops * (3.5 if case.backward else 1)
            row["bytes"] = moved * (2 if case.backward else 1)
        yield row


def with_rates(row: dict[str, Any], limit: Mapping[str, float]) -> dict[str, Any]:
    """A measured row with what follows from its time, FLOPs and bytes."""
    if "error" in row:
        return row
    seconds = row["milliseconds"] / 1e3
    needed = max(row[name] / limit[f"{name}_per_second"] for name in ("flops", "bytes"))
    return row | {
        "teraflops_per_second": row["flops"] / seconds / 1e12,
        "gigabytes_per_second": row["bytes"] / seconds / 1e9,
        "least_milliseconds": 1e3 * needed,
        "fraction_of_limit": needed / seconds,
    }


def timings(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of a call, `repeats` times, each over as many calls as take 10 ms."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    count = max(1, round(0.01 / max(time.perf_counter() - start, 1e-6)))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        jax.block_until_ready(out)
        seconds.append((time.perf_counter() - start) / count)
    return seconds


def free_bytes() -> int:
    """Memory of the device that a program may still take."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return sys.maxsize
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def limits(dtype: str, repeats: int) -> dict[str, float]:
    """FLOP/s of a large matrix product and bytes/s of a large copy on this device."""
    size, count = (8192, 2**29) if jax.default_backend() == "gpu" else (1024, 2**26)
    # Products of equal numbers take less power, and so are faster, than those of data.
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    y = jnp.ones(count // jnp.dtype(dtype).itemsize, dtype)
    product, copy = jax.jit(jnp.dot), jax.jit(lambda y: y + 1)
    return {
        "flops_per_second": 2 * size**3 / min(timings(lambda: product(x, x), repeats)),
        "bytes_per_second": 2 * count / min(timings(lambda: copy(y), repeats)),
    }


def benchmark(config: ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Times all cases of a config, prints a table and writes it to the workdir.

    Returns:
      What `benchmark.json` holds: device, versions, command, limits, config, and a row for every
      case.

    Raises:
      ValueError: a mechanism, an implementation or a pass is unknown, or the workdir holds cases of
        another config or device; then nothing on disk has changed.
    """
    todo = groups(config)
    device = jax.devices()[0].device_kind
    workdir = claim_workdir(workdir, as_dict(config) | {"device": device})
    path = workdir / "cases.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    path.write_text("".join(whole))

    def keep(row):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def add(row):
        rows.append(row)
        keep(row)
        print(line_of(row), flush=True)

    if whole:
        limit, *rows = (json.loads(line) for line in whole)
    else:
        limit, rows = limits(config.dtype, config.repeats), []
        keep(limit)
    print("  ".join(f"{name:{form.split('.')[0]}}" for _, name, form, _ in COLUMNS).rstrip())
    for row in rows:
        print(line_of(row))
    for group in todo:
        left = []
        for case in group:
            if any(case.key.items() <= row.items() for row in rows):
                continue
            same = [row for row in rows if all(row[name] == case.key[name] for name in SERIES)]
            slowest = max((row.get("milliseconds", 0) for row in same), default=0)
            if slowest > 1e3 * config.patience:
                reason = (
                    f"{slowest / 1e3:.1f} s at a smaller length, above patience={config.patience}"
                )
                add(case.key | {"error": "too slow", "reason": reason})
            else:
                left.append(case)
        for row in results(config, left):
            add(with_rates(row, limit))
    result = {
        "device": device,
        "versions": {
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "python": platform.python_version(),
            "platform": jax.devices()[0].client.platform_version,
        },
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
        "limits": limit,
        "config": as_dict(config),
        "rows": rows,
    }
    if config.groups:
        result["ratios"] = ratios(rows)
        print("\n".join(map(ratio_line, result["ratios"])))
    else:
        result["growth"] = growth(rows, config.baseline)
        print("\n".join(map(growth_line, result["growth"])))
    (workdir / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    (plot_rates if config.groups else plot)(rows, workdir / "benchmark.png")
    return result


def line_of(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    cells = []
    for key, _, form, unit in COLUMNS:
        if key not in row:
            cells.append(f"{'-':{form.split('.')[0]}}")
        else:
            cells.append(f"{row[key] / unit if '.' in form else row[key]:{form}}")
    return "  ".join([*cells, row.get("error", "")]).rstrip()


def growth_line(entry: Mapping[str, Any]) -> str:
    """A sentence on how one series grows."""
    said = " ".join(entry[name] for name in SERIES) + ":"
    if "exponent" in entry:
        said += " {milliseconds_per_1024:.3g} ms per 1,024 positions".format(**entry)
        said += " (R^2 {r_squared:.4f}), exponent {exponent:.2f} at the end".format(**entry)
    if "crossover" in entry:
        length = entry["crossover"]
        said += "; never" if length is None else f"; from length {length:,.0f} on"
        said += " faster than the baseline"
    return said


def ratio_line(entry: Mapping[str, Any]) -> str:
    """A sentence on how fast a program is beside others."""
    said = "{mechanism} {implementation} {pass}, {length:,} x {head_dim}:".format(**entry)
    parts = [f"{x:.2f} times as fast as {name}" for name, x in entry["times_faster"].items()]
    if entry["of_plain"]:
        parts.append(f"{entry['of_plain']:.3f} of its plain program's rate")
    return f"{said} {', '.join(parts)}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds and temporary memory over the length, a line for every implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    names = list(dict.fromkeys((row["mechanism"], row["implementation"]) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    figure = Figure(figsize=(5 + 5 * len(kinds), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(kinds))
    panels = [(kind, "milliseconds") for kind in kinds] + [(kinds[-1], "temporary_megabytes")]
    for ax, (kind, key) in zip(axes, panels):
        ax.set(xscale="log", yscale="log", title=kind.replace("_", " + "))
        for n, name in enumerate(names):
            own = [
                row
                for row in rows
                if (row["mechanism"], row["implementation"]) == name and row["pass"] == kind
            ]
            label = " ".join(name).replace("_", " ")
            lost = [row["length"] for row in own if "error" in row]
            if lost:
                reason = next(row["error"] for row in own if "error" in row)
                label += f" ({reason} at {min(lost):,})"
            points = [(row["length"], row[key]) for row in own if key in row and "error" not in row]
            style = dict(color=f"C{n % 10}", marker="osD^vPX*"[n % 8], ls=("-", "--")[n % 2])
            ax.plot(*(zip(*points) if points else ([], [])), label=label, alpha=0.8, **style)
        short = (f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths)
        ax.set_xticks(lengths, list(short))
        ax.xaxis.set_minor_formatter("")
        ax.set(xlabel="length", ylabel=key.replace("_", " "))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def plot_rates(rows: list[dict[str, Any]], path: Path) -> None:
    """TFLOP/s of every program and shape, a bar for every implementation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    places = "mechanism", "length", "head_dim", "batch", "heads"
    places = list(dict.fromkeys(tuple(row[name] for name in places) for row in rows))
    figure = Figure(figsize=(3 + 4.5 * len(kinds), 1.5 + 0.42 * len(places)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for ax, kind in zip(axes, kinds):
        for n, name in enumerate(names):
            found = {
                (row["mechanism"], row["length"], row["head_dim"], row["batch"], row["heads"]): row
                for row in rows
                if (row["implementation"], row["pass"]) == (name, kind)
            }
            values = [found.get(p, {}).get("teraflops_per_second", 0) for p in places]
            at = [i + (n - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(places))]
            ax.barh(at, values, height=0.8 / len(names), label=name)
        ax.set(title=kind.replace("_", " + "), xlabel="TFLOP/s of the pairs that the mask allows")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25)
    labels = [f"{p[0].replace('_', ' ')}, {p[1]:,} x {p[2]}" for p in places]
    axes[0].set_yticks(range(len(places)), labels)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    family = flags.DEFINE_string("family", None, "Family of mechanisms; as config.family.")

    def main(config: ConfigDict, workdir: str) -> None:
        if family.value:
            config.family = family.value
        benchmark(config, workdir)

    run_main(main, Path(__file__).parent / "configs/benchmark.py", "runs/benchmark")
