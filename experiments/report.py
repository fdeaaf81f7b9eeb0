"""What a benchmark keeps, prints and draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attn_lab.training import read_metrics
from experiments.growth import SERIES

PASSES = "forward", "forward_backward"
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
    ("fraction_of_bandwidth", "of bandwidth", ">12.3g", 1),
    ("microseconds_a_step", "us a step", ">9.3g", 1),
)
HEAD = "  ".join(f"{name:{form.split('.')[0]}}" for _, name, form, _ in COLUMNS).rstrip()


class Lines:
    """Rows in a file, each a line of JSON; what a kill left of a last line is dropped.

    Args:
      path: the file, whose rows are `rows` if it is there.
    """

    def __init__(self, path: Path):
        self.path, self.rows = path, read_metrics(path) if path.exists() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        partial.replace(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it is in the file when this returns."""
        self.rows.append(dict(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


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


def crossover_line(entry: Mapping[str, Any]) -> str:
    """A sentence on where a mechanism is faster than each implementation of the baseline."""
    said = "{mechanism} {pass}: faster than {baseline} by".format(**entry)
    parts = [
        f"{name} {'never' if length is None else f'from length {length:,.0f} on'}"
        for name, length in entry["crossover"].items()
    ]
    return f"{said} {', by '.join(parts)}"


def ratio_line(entry: Mapping[str, Any]) -> str:
    """A sentence on how fast a program is beside others."""
    said = "{mechanism} {implementation} {pass}, {batch} x {length:,} x {heads} x {head_dim}:"
    said = said.format(**entry)
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
    """Rates of every program and shape, a bar for every implementation.

    They are of the bytes where these take the device longer than the FLOPs in most rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    places = "mechanism", "length", "head_dim", "batch", "heads"
    places = list(dict.fromkeys(tuple(row[name] for name in places) for row in rows))
    rate, label = "teraflops_per_second", "TFLOP/s of the pairs that the mask allows"
    if 2 * sum(row.get("bound") == "bytes" for row in rows) > len(rows):
        rate, label = "gigabytes_per_second", "GB/s of inputs and outputs, each counted once"
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
            values = [found.get(p, {}).get(rate, 0) for p in places]
            at = [i + (n - (len(names) - 1) / 2) * 0.8 / len(names) for i in range(len(places))]
            ax.barh(at, values, height=0.8 / len(names), label=name)
        ax.set(title=kind.replace("_", " + "), xlabel=label)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", alpha=0.25)
    labels = [f"{n.replace('_', ' ')}, {b} x {t:,} x {h} x {d}" for n, t, d, b, h in places]
    axes[0].set_yticks(range(len(places)), labels)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path, dpi=120)
