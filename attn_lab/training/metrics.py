"""Metrics on disk: JSON lines, read back as dictionaries and drawn."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`, in order; a last line cut short by a crash is left out.

    Args:
      path: the file, or the workdir it is in.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsFile:
    """Rows of metrics, each with a `step`, kept in memory and appended to a file.

    Args:
      path: the file; None keeps the rows in memory only.
      step: rows of later steps, which an interrupted run left behind, are dropped.
      write: False reads the file but leaves it to another process to change it.
    """

    def __init__(self, path: Path | None, step: int = 0, *, write: bool = True):
        self.path = path if write else None
        self.rows: list[dict[str, float]] = []
        if path is not None:
            rows = read_metrics(path) if path.exists() else []
            self.rows = [row for row in rows if row["step"] <= step]
        if self.path is not None:
            partial = path.with_name(path.name + ".partial")
            partial.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(partial, path)

    def append(self, row: Mapping[str, float]) -> None:
        """Adds a row; it is in the file when this returns."""
        self.rows.append(dict(row))
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def plot_metrics(
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    names: Sequence[str],
    path: str | Path,
) -> None:
    """Draws metrics over steps into an image file: one panel per metric, one line per run.

    Args:
      runs: rows of metrics, as from `read_metrics`, by the label of the run.
      names: the metrics to draw, such as `val/loss`.
      path: the image, in a format that its suffix tells.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for label, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*points) if points else ([], []), label=label)
        panel.set(xlabel="step", ylabel=name)
        panel.legend()
    figure.savefig(path, dpi=150)
