"""How long mechanisms take: `python -m experiments.benchmark --family attention`.

Every case (mechanism, implementation, sizes, pass) is timed against the limit of the device, which
is measured in the same run: a large matrix product and a large copy. A mechanism is a row of the
catalogue or, in `config.groups`, one of `experiments/programs.py`. All are compiled before the
first is timed; other libraries come last. The workdir receives `cases.jsonl`, a line a case as it
is done, `benchmark.json` and `benchmark.png`. The same command continues a run that was
interrupted. Presets are in `experiments/configs/benchmark.py`.

FLOPs are those of the pairs that the mask allows, bytes those of inputs and outputs alone, and the
fraction of the limit is the least time that the device needs for either, over the time it took.
Printed last is, of mechanisms, how times grow with length and from which length on they are faster
than `config.baseline`; of programs, how fast they are beside other implementations, how near to
the rate of their plain program, and from which length on they are faster than each implementation
of the baseline.
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
from experiments.compiling import Ready, compile_all, failure
from experiments.growth import SERIES, crossovers, fastest, growth
from experiments.programs import Program, program
from experiments.ratios import ratios
from experiments.report import (
    HEAD,
    PASSES,
    Lines,
    crossover_line,
    growth_line,
    line_of,
    plot,
    plot_rates,
    ratio_line,
)

CUDNN = "cudnn"


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
      row: the mechanism.
      sizes: its sizes.
      implementation: its name.
      variant: the keyword arguments that choose it; None of another library.
      kind: the pass.
    """

    row: Mechanism
    sizes: Sizes
    implementation: str
    variant: Mapping[str, str] | None
    kind: str

    def __reduce__(self):
        """By the name of the row, whose functions may have none."""
        given = self.implementation, self.variant, self.kind
        return _case, (self.row.name, isinstance(self.row, Program), self.sizes, *given)

    @property
    def key(self) -> dict[str, Any]:
        """What identifies the case in a row of results."""
        sizes = {"length": self.sizes.T, "batch": self.sizes.B, "heads": self.sizes.H}
        names = {"mechanism": self.row.name, "implementation": self.implementation}
        return names | {"pass": self.kind} | sizes | {"head_dim": self.sizes.D}

    @property
    def of_peer(self) -> bool:
        return self.variant is None

    @property
    def place(self) -> tuple[str, Sizes]:
        """What cases of the same arguments have in common."""
        return self.row.name, self.sizes

    @property
    def backward(self) -> bool:
        return self.kind != PASSES[0]

    @property
    def constants(self) -> tuple[str, ...]:
        """The arguments of which no gradients are taken."""
        return self.row.constants if isinstance(self.row, Program) else ()


def _case(name, programmed, sizes, *given):
    return Case(program(name, sizes.T) if programmed else find(name), sizes, *given)


def implementations(row: Mechanism, config: ConfigDict) -> dict[str, Mapping[str, str] | None]:
    """The row's implementations by name: keyword arguments that choose them, None of libraries.

    On a GPU and in half precision plain softmax attention also has "cudnn", and so have the
    programs that it can compute. Recurrences and programs have the libraries of `peers` where these
    are installed.
    """
    variants = row.variants
    half = jnp.dtype(config.dtype).itemsize == 2
    fixed = row.fixed if isinstance(row, Program) else row.name == "dot_product_attention"
    if fixed and half and jax.default_backend() == "gpu":
        variants = *variants, {"implementation": CUDNN}
    found = {next(iter(v.values()), row.function.__name__): v for v in variants}
    if peer := peers.peer_of(row):
        found[peer] = None
    return found


def cases(config: ConfigDict) -> list[Case]:
    """The cases of a config, those of other libraries last.

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
        own = []
        for name in (part.mechanisms or part.families[part.family]).split(","):
            row = program(name, part.length) if config.groups else find(name)
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
            for name, variant in calls.items():
                for kind in part.passes if not wanted or name in wanted else ():
                    found.append(Case(row, row.fit(sizes), name, variant, kind))
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
    return sorted(found, key=lambda case: case.of_peer)


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


def lowered(config: ConfigDict, case: Case) -> jax.stages.Lowered:
    """The program of a case."""
    causal = pattern(config, case.row)

    def forward(arrays):
        return case.row.call(arrays, causal=causal, **case.variant)

    def both(arrays):
        moving = {name: x for name, x in arrays.items() if name not in case.constants}
        out, pullback = jax.vjp(lambda moving: forward(arrays | moving), moving)
        return out, pullback(out)

    arrays = jax.eval_shape(functools.partial(example, config, case))
    return jax.jit(both if case.backward else forward).lower(arrays)


def work_of(config: ConfigDict, case: Case) -> dict[str, float]:
    """FLOPs and bytes of a forward pass."""
    flops = flops_of(case.row, case.sizes, pattern(config, case.row))
    return {"flops": flops, "bytes": case.row.bytes(case.sizes, config.dtype)}


def measure(
    config: ConfigDict,
    case: Case,
    program: Ready | dict[str, Any] | None,
    arrays: Mapping[str, jax.Array],
) -> dict[str, Any]:
    """Time and memory of a case.

    Args:
      config: of the benchmark.
      case: what to time.
      program: from `compile_all`; of a peer a forward pass of ours to compare it with, or None.
      arrays: the arguments.

    Returns:
      `error` and `reason` where it does not fit into memory, is refused or is not tuned in
      `config.tuning` seconds.
    """
    if isinstance(program, dict):
        return program
    memory = {}
    try:
        if case.of_peer:
            given = case.row, arrays, case.backward, case.constants
            timed, memory = peers.prepare(*given, program and program.program, config.tuning)
            seconds = timings(timed, config.repeats)
        else:
            memory["temporary_megabytes"] = program.temporary / 1e6
            free = free_bytes()
            if program.temporary > free:
                reason = (
                    f"{program.temporary / 1e9:.1f} GB of temporaries, {free / 1e9:.1f} GB free"
                )
                return {"error": "out of memory", "reason": reason, **memory}
            seconds = timings(lambda: program.program(arrays), config.repeats)
    except TimeoutError as error:
        return {"error": "too slow to tune", "reason": str(error)}
    except RuntimeError as error:
        found = failure(error)
        if found["error"] == "refused" and not case.of_peer:
            raise
        return found | memory
    milliseconds = 1e3 * min(seconds)
    found = {"milliseconds": milliseconds, "median_milliseconds": 1e3 * statistics.median(seconds)}
    if isinstance(case.row, Program) and case.row.steps:
        found["microseconds_a_step"] = 1e3 * milliseconds / case.row.steps
    return found | memory


def too_slow(config: ConfigDict, case: Case, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Why a case is left out after what smaller ones took, or nothing."""
    same = [row for row in rows if all(row[name] == case.key[name] for name in SERIES)]
    slowest = max((row.get("milliseconds", 0) for row in same), default=0)
    if slowest <= 1e3 * config.patience:
        return {}
    reason = f"{slowest / 1e3:.1f} s at a smaller length, above patience={config.patience}"
    return {"error": "too slow", "reason": reason}


def results(
    config: ConfigDict, todo: list[Case], rows: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Compiles all cases and times them one by one, as measured rows; other libraries later.

    Args:
      config: of the benchmark.
      todo: the cases.
      rows: of cases that are done, by which others are left out; it may grow meanwhile.
    """
    own = [case for case in todo if not case.of_peer]
    others = [case for case in todo if case.of_peer]
    one_of = {case.place: case for case in todo}
    work = {place: work_of(config, case) for place, case in one_of.items()}
    # Compilation beside them would disturb the times.
    programs = compile_all(functools.partial(lowered, config), own, config.processes)
    place, arrays = None, None

    def timed(case, program):
        nonlocal place, arrays
        found = too_slow(config, case, rows)
        if not found and case.place != place and not isinstance(program, dict):
            arrays = None  # before others take their memory
            place, arrays = case.place, jax.jit(functools.partial(example, config, case))()
        row = case.key | (found or measure(config, case, program, arrays))
        if isinstance(case.row, Program):
            row["plain"] = case.row.plain
        if "error" not in row:
            # A backward pass computes scores again and has four products more: 5 beside the 2 of
            # forward.
            flops, moved = work[case.place].values()
            row["flops"] = flops * (3.5 if case.backward else 1)
            row["bytes"] = moved * (2 if case.backward else 1)
        return row

    yield from map(timed, own, programs)
    compile_others(config, others)
    forward = {c.place: p for c, p in zip(own, programs) if not (c.backward or isinstance(p, dict))}
    for case in others:
        yield timed(case, forward.get(case.place))


def compile_others(config: ConfigDict, cases: list[Case]) -> None:
    """Compiles the kernels of the libraries that would compile one after the other."""
    apart = {}
    # They do not depend on batch and length, and a backward pass has those of forward.
    for case in sorted(cases, key=lambda case: not case.backward):
        if case.implementation == peers.FLA:
            apart.setdefault((case.row.name, case.sizes.H, case.sizes.D), case)
    with ThreadPoolExecutor(config.processes) as pool:
        for case in apart.values():
            given = case.row, case.sizes, config.dtype, case.backward, config.tuning
            pool.submit(peers.compile_apart, *given)


def with_rates(row: dict[str, Any], limit: Mapping[str, float]) -> dict[str, Any]:
    """A measured row with what follows from its time, FLOPs and bytes."""
    if "error" in row:
        return row
    seconds = row["milliseconds"] / 1e3
    needed = {name: row[name] / limit[f"{name}_per_second"] for name in ("flops", "bytes")}
    bound = max(needed, key=needed.get)
    return row | {
        "teraflops_per_second": row["flops"] / seconds / 1e12,
        "gigabytes_per_second": row["bytes"] / seconds / 1e9,
        "bound": bound,
        "least_milliseconds": 1e3 * needed[bound],
        "fraction_of_limit": needed[bound] / seconds,
        "fraction_of_bandwidth": needed["bytes"] / seconds,
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
    y = jnp.ones(count // 4)  # threads copy more bytes at once than of shorter numbers
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
    todo = cases(config)
    device = jax.devices()[0].device_kind
    workdir = claim_workdir(workdir, as_dict(config) | {"device": device})
    kept = Lines(workdir / "cases.jsonl")
    if not kept.rows:
        kept.append(limits(config.dtype, config.repeats))
    limit, *rows = kept.rows
    print(HEAD)
    for row in rows:
        print(line_of(row))
    left = [c for c in todo if not any(c.key.items() <= row.items() for row in rows)]
    for row in results(config, left, rows):
        rows.append(with_rates(row, limit))
        kept.append(rows[-1])
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
    }
    if config.groups:
        best = fastest(rows, config.baseline)
        crossed = crossovers(best, config.baseline)
        result |= {"ratios": ratios(rows), "crossovers": crossed}
        said = *map(ratio_line, result["ratios"]), *map(crossover_line, crossed)
        drawn, draw = (best, plot) if crossed else (rows, plot_rates)
    else:
        result["growth"] = growth(rows, config.baseline)
        said = map(growth_line, result["growth"])
        drawn, draw = rows, plot
    print(*said, sep="\n")
    (workdir / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(drawn, workdir / "benchmark.png")
    return result


if __name__ == "__main__":
    family = flags.DEFINE_string("family", None, "Family of mechanisms; as config.family.")

    def main(config: ConfigDict, workdir: str) -> None:
        if family.value:
            config.family = family.value
        benchmark(config, workdir)

    run_main(main, Path(__file__).parent / "configs/benchmark.py", "runs/benchmark")
