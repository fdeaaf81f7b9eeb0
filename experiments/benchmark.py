"""How long mechanisms take: `python -m experiments.benchmark --family attention`.

Every case (mechanism, implementation, length, pass) is timed against the limit of the device, which
is measured in the same run: a large matrix product and a large copy. The workdir receives
`cases.jsonl`, a line a case as it is done, `benchmark.json` and `benchmark.png`. The same command
continues a run that was interrupted. Presets are in `experiments/configs/benchmark.py`.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from ml_collections import ConfigDict

from attn_lab.catalogue import Mechanism, Sizes, find
from attn_lab.training import run_main

PASSES = "forward", "forward_backward"
CUDNN = "cudnn"
COLUMNS = (
    ("mechanism", "mechanism", "<28"),
    ("implementation", "implementation", "<14"),
    ("pass", "pass", "<17"),
    ("length", "length", ">7"),
    ("milliseconds", "ms", ">10.3f"),
    ("temporary_megabytes", "temp, MB", ">10.1f"),
    ("teraflops_per_second", "TFLOP/s", ">9.3f"),
    ("gigabytes_per_second", "GB/s", ">9.1f"),
    ("fraction_of_limit", "of limit", ">9.3f"),
)


def sizes_of(config: ConfigDict, row: Mechanism, length: int) -> Sizes:
    """The sizes of a case."""
    sizes = Sizes(
        B=config.batch,
        T=length,
        S=length,
        H=config.heads,
        K=config.kv_heads,
        D=config.dim,
        V=config.dim,
    )
    return row.fit(sizes)


def implementations(row: Mechanism, config: ConfigDict) -> dict[str, Callable[..., jax.Array]]:
    """The row's implementations by name, of arrays and a keyword `causal`.

    Plain softmax attention also has "cudnn" on a GPU, in half precision.
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
    return found


def cases(config: ConfigDict) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What identifies every case, and the function that measures it.

    Raises:
      ValueError: a mechanism, an implementation or a pass is unknown.
    """
    names = config.mechanisms.split(",") if config.mechanisms else DEFAULTS.get(config.family, ())
    rows = [find(name) for name in names]
    if not rows:
        raise ValueError(
            f"family must be one of {', '.join(DEFAULTS)}, or mechanisms be named; "
            f"got {config.family!r}"
        )
    wanted = [name for name in config.implementations.split(",") if name]
    known = {name for row in rows for variant in row.variants for name in variant.values()}
    for name in wanted:
        if name not in known | {CUDNN}:
            raise ValueError(f"implementation {name!r} is unknown; choose of {sorted(known)}")
    for name in config.passes:
        if name not in PASSES:
            raise ValueError(f"passes must be of {', '.join(PASSES)}, got {name!r}")
    for length in config.lengths:
        for row in rows:
            for name, call in implementations(row, config).items():
                for kind in config.passes:
                    case = {
                        "mechanism": row.name,
                        "implementation": name,
                        "pass": kind,
                        "length": length,
                    }
                    if not wanted or name in wanted:
                        yield case, lambda a=(row, call, kind, length): measure(config, *a)


def measure(
    config: ConfigDict, row: Mechanism, call: Callable[..., jax.Array], kind: str, length: int
) -> dict[str, Any]:
    """Time, memory and rates of a case; `error` instead where it does not fit into memory."""
    sizes = sizes_of(config, row, length)
    arrays = row.example(sizes, jax.random.key(0), jnp.dtype(config.dtype))
    causal = config.causal if config.causal in row.causal else row.causal[0]

    def forward(arrays):
        return call(arrays, causal)

    def both(arrays):
        out, pullback = jax.vjp(forward, arrays)
        return out, pullback(out)

    backward = kind == "forward_backward"
    try:
        compiled = jax.jit(both if backward else forward).lower(arrays).compile()
        temporary = compiled.memory_analysis().temp_size_in_bytes
        if temporary > free_bytes():
            return {"error": "out of memory", "temporary_megabytes": temporary / 1e6}
        seconds = timings(lambda: compiled(arrays), config.repeats)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            raise
        return {"error": "out of memory"}
    half = 0.5 if causal and row.family == "attention" else 1.0
    flops = row.flops(sizes) * half * (3.5 if backward else 1)
    moved = row.bytes(sizes, jnp.dtype(config.dtype)) * (2 if backward else 1)
    best = min(seconds)
    return {
        "milliseconds": 1e3 * best,
        "median_milliseconds": 1e3 * statistics.median(seconds),
        "temporary_megabytes": temporary / 1e6,
        "flops": flops,
        "bytes": moved,
        "teraflops_per_second": flops / best / 1e12,
        "gigabytes_per_second": moved / best / 1e9,
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
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
      What `benchmark.json` holds: device, versions, limits, config, and a row for every case.
    """
    if "family" in flags.FLAGS and flags.FLAGS.is_parsed() and flags.FLAGS.family:
        config.family = flags.FLAGS.family
    workdir, todo = Path(workdir), list(cases(config))
    workdir.mkdir(parents=True, exist_ok=True)
    described = json.loads(config.to_json())
    if (workdir / "config.json").exists():
        if json.loads((workdir / "config.json").read_text()) != described:
            raise ValueError(f"workdir {workdir} holds cases of another config; choose a new one")
    else:
        (workdir / "config.json").write_text(json.dumps(described, indent=1))
    path = workdir / "cases.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    rows = [json.loads(line) for line in whole]
    path.write_text("".join(whole))
    limit = limits(config.dtype, config.repeats)
    print("  ".join(f"{title:{form.split('.')[0].rstrip('f')}}" for _, title, form in COLUMNS))
    for row in rows:
        print(line_of(row))
    for case, measured in todo:
        if any(case.items() <= row.items() for row in rows):
            continue
        row = case | measured()
        if "error" not in row:
            needed = row["flops"] / limit["flops_per_second"]
            needed = max(needed, row["bytes"] / limit["bytes_per_second"])
            row["fraction_of_limit"] = 1e3 * needed / row["milliseconds"]
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line_of(row), flush=True)
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "command": " ".join(["python -m experiments.benchmark", *sys.argv[1:]]),
        "limits": limit,
        "config": described,
        "rows": rows,
    }
    (workdir / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(rows, workdir / "benchmark.png")
    return result


def line_of(row: Mapping[str, Any]) -> str:
    """A line of the table."""
    cells = [
        f"{row[key]:{form}}" if key in row else f"{'-':>{form[1:].split('.')[0]}}"
        for key, _, form in COLUMNS
    ]
    return "  ".join([*cells, row.get("error", "")]).rstrip()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Milliseconds and temporary memory over the length, a line for every implementation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    figure, axes = plt.subplots(1, 1 + len(kinds), figsize=(5 + 5 * len(kinds), 4.5))
    panels = [(kind, "milliseconds") for kind in kinds] + [(kinds[-1], "temporary_megabytes")]
    for ax, (kind, key) in zip(axes, panels):
        some = [row for row in rows if row["pass"] == kind and key in row]
        for name in dict.fromkeys((row["mechanism"], row["implementation"]) for row in some):
            line = [row for row in some if (row["mechanism"], row["implementation"]) == name]
            ax.loglog(*zip(*((r["length"], r[key]) for r in line)), "o-", label=", ".join(name))
        ax.set(xlabel="length", ylabel=key.replace("_", " "), title=kind.replace("_", " + "))
    if axes[0].lines:
        axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


DEFAULTS = {
    "attention": (
        "dot_product_attention",
        "sliding_window_attention",
        "sigmoid_attention",
        "entmax_attention",
    ),
    "recurrence": ("linear_attention", "gated_linear_attention", "delta_rule"),
}

if __name__ == "__main__":
    flags.DEFINE_enum("family", None, list(DEFAULTS), "Family of mechanisms; as config.family.")
    here = Path(__file__).parent
    run_main(benchmark, here / "configs" / "benchmark.py", "runs/benchmark")
