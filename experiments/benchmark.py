"""How long mechanisms take: `python -m experiments.benchmark --family attention`.

Every case (mechanism, implementation, length, pass) is timed against the limit of the device, which
is measured in the same run: a large matrix product and a large copy. The workdir receives
`cases.jsonl`, a line a case as it is done, `benchmark.json` and `benchmark.png`. The same command
continues a run that was interrupted. Presets are in `experiments/configs/benchmark.py`.

FLOPs are those of the pairs that the mask allows, bytes those of inputs and outputs alone, and the
fraction of the limit is the least time that the device needs for either, over the time it took. How
times grow with length, and from which length on a mechanism is faster than `config.baseline`, is
printed last.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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

PASSES = "forward", "forward_backward"
CUDNN = "cudnn"
COLUMNS = (
    ("mechanism", "mechanism", "<28", None),
    ("implementation", "implementation", "<14", None),
    ("pass", "pass", "<16", None),
    ("length", "length", ">7", 1),
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


def sizes_of(config: ConfigDict, row: Mechanism, length: int) -> Sizes:
    """The sizes of a case."""
    sizes = Sizes(
        B=config.batch,
        T=length,
        S=length,
        H=config.heads,
        K=config.kv_heads,
        D=config.head_dim,
        V=config.head_dim,
    )
    return row.fit(sizes)


def implementations(row: Mechanism, config: ConfigDict) -> dict[str, Any]:
    """The row's implementations by name: functions of arrays and `causal`, or the name of a peer.

    Plain softmax attention also has "cudnn" on a GPU, in half precision, and recurrences have the
    library of `peers` where it is installed.
    """
    found = {}
    for variant in row.variants:
        name = next(iter(variant.values()), row.function.__name__)

        def call(arrays, causal, variant=variant):
            return row.call(arrays, causal=causal, **variant)

        found[name] = call
    half = jnp.dtype(config.dtype).itemsize == 2
    if row.name == "dot_product_attention" and jax.default_backend() == "gpu" and half:

        def fixed(arrays, causal):
            part = dict(is_causal=causal, implementation=CUDNN)
            return jax.nn.dot_product_attention(*(arrays[n] for n in "qkv"), **part)

        found[CUDNN] = fixed
    if peers.has_peer(row):
        found[peers.NAME] = peers.NAME
    return found


def cases(config: ConfigDict) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What identifies every case, and the function that measures it.

    Raises:
      ValueError: a mechanism, an implementation or a pass is unknown.
    """
    if not config.mechanisms and config.family not in config.families:
        known = ", ".join(config.families)
        raise ValueError(f"family must be one of {known}; got {config.family!r}")
    names = config.mechanisms or config.families[config.family]
    rows = [find(name) for name in names.split(",")]
    wanted = [name for name in config.implementations.split(",") if name]
    own = {row.name: implementations(row, config) for row in rows}
    known = sorted({name for calls in own.values() for name in calls})
    for name in wanted:
        if name not in known:
            needs = {
                CUDNN: "; it needs a GPU, 16 bits and dot_product_attention",
                peers.NAME: "; it needs a GPU, PyTorch, fla-core and a recurrence that it has",
            }
            raise ValueError(
                f"implementation {name!r} is not there; choose of {', '.join(known)}"
                + needs.get(name, "")
            )
    for name in config.passes:
        if name not in PASSES:
            raise ValueError(f"passes must be of {', '.join(PASSES)}, got {name!r}")
    for name in ("lengths", "passes"):
        if not config[name]:
            raise ValueError(f"{name} must have at least one entry, got none")
    for length in config.lengths:
        for row in rows:
            for name, call in own[row.name].items():
                for kind in config.passes:
                    case = {
                        "mechanism": row.name,
                        "implementation": name,
                        "pass": kind,
                        "length": length,
                    }
                    if not wanted or name in wanted:
                        yield case, lambda a=(row, call, kind, length): measure(config, *a)


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


def measure(
    config: ConfigDict, row: Mechanism, call: Any, kind: str, length: int
) -> dict[str, Any]:
    """Time, memory and rates of a case.

    `error` and `reason` where it does not fit into memory, or where a peer refuses the call.
    """
    sizes = sizes_of(config, row, length)
    dtype = jnp.dtype(config.dtype)
    causal = config.causal if config.causal in row.causal else row.causal[0]

    def forward(arrays):
        return call(arrays, causal)

    def both(arrays):
        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(out)

    backward = kind == "forward_backward"
    memory = {}
    try:
        arrays = row.example(sizes, jax.random.key(0), dtype)
        if call == peers.NAME:
            timed, memory = peers.prepare(row, arrays, backward)
            seconds = timings(timed, config.repeats)
        else:
            compiled = jax.jit(both if backward else forward).lower(arrays).compile()
            temporary = compiled.memory_analysis().temp_size_in_bytes
            memory["temporary_megabytes"] = temporary / 1e6
            free = free_bytes()
            if temporary > free:
                reason = f"{temporary / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB free"
                return {"error": "out of memory", "reason": reason, **memory}
            seconds = timings(lambda: compiled(arrays), config.repeats)
    except RuntimeError as error:
        reason = {"reason": str(error).split("\n")[0][:300], **memory}
        if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
            return {"error": "out of memory", **reason}
        if call == peers.NAME:
            return {"error": "refused", **reason}
        raise
    # A backward pass computes scores again and has four products more: 5 beside the 2 of forward.
    flops = flops_of(row, sizes, causal) * (3.5 if backward else 1)
    return {
        "milliseconds": 1e3 * min(seconds),
        "median_milliseconds": 1e3 * statistics.median(seconds),
        **memory,
        "flops": flops,
        "bytes": row.bytes(sizes, dtype) * (2 if backward else 1),
    }


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
    x = jnp.ones((size, size), dtype)
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
    todo = list(cases(config))
    device = jax.devices()[0].device_kind
    workdir = claim_workdir(workdir, as_dict(config) | {"device": device})
    path = workdir / "cases.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    path.write_text("".join(whole))

    def keep(row):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    if whole:
        limit, *rows = (json.loads(line) for line in whole)
    else:
        limit, rows = limits(config.dtype, config.repeats), []
        keep(limit)
    print("  ".join(f"{name:{form.split('.')[0]}}" for _, name, form, _ in COLUMNS).rstrip())
    for row in rows:
        print(line_of(row))
    for case, measured in todo:
        if any(case.items() <= row.items() for row in rows):
            continue
        same = [row for row in rows if all(row[name] == case[name] for name in SERIES)]
        slowest = max((row.get("milliseconds", 0) for row in same), default=0)
        if slowest > 1e3 * config.patience:
            reason = f"{slowest / 1e3:.1f} s at a smaller length, above patience={config.patience}"
            rows.append(case | {"error": "too slow", "reason": reason})
        else:
            rows.append(with_rates(case | measured(), limit))
        keep(rows[-1])
        print(line_of(rows[-1]), flush=True)
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
        "growth": growth(rows, config.baseline),
    }
    for entry in result["growth"]:
        print(growth_line(entry))
    (workdir / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, workdir / "benchmark.png")
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


if __name__ == "__main__":
    family = flags.DEFINE_string("family", None, "Family of mechanisms; as config.family.")

    def main(config: ConfigDict, workdir: str) -> None:
        if family.value:
            config.family = family.value
        benchmark(config, workdir)

    run_main(main, Path(__file__).parent / "configs/benchmark.py", "runs/benchmark")
