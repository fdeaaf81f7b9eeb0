"""How times grow with length: straight lines, exponents, and where two of them cross."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

SERIES = "mechanism", "implementation", "pass"


def growth(rows: Iterable[Mapping[str, Any]], baseline: str = "") -> list[dict[str, Any]]:
    """How every series of a benchmark grows, one entry for a mechanism, implementation and pass.

    Args:
      rows: of a benchmark: what identifies a case, and its `milliseconds` or an `error`.
      baseline: a mechanism, to whose fastest times of the same pass the others are compared.

    Returns:
      Entries with `milliseconds_per_1024` and `r_squared` of the straight line through all times,
      `exponent` of the power law between the last two lengths (three points at least), and
      `crossover`: the length from which on the series stays below the baseline, interpolated
      between the measured lengths; their first where it always does, None where it never does.
      Where the baseline has no time it counts as slower.
    """
    series: dict[tuple, dict[int, float]] = {}
    for row in rows:
        own = series.setdefault(tuple(row[name] for name in SERIES), {})
        own[row["length"]] = row.get("milliseconds", math.inf)
    entries = []
    for key, times in series.items():
        times = dict(sorted(times.items()))
        entry = dict(zip(SERIES, key)) | line({n: t for n, t in times.items() if t < math.inf})
        if baseline and key[0] != baseline:
            rivals = [
                own for name, own in series.items() if (name[0], name[2]) == (baseline, key[2])
            ]
            best = {n: min(own.get(n, math.inf) for own in rivals) for n in times} if rivals else {}
            entry["crossover"] = crossover(times, best) if best else None
        entries.append(entry)
    return entries


def fastest(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """The rows of the baseline, and of other mechanisms the fastest of every length and pass.

    The latter have the implementation "fastest", and under `by` the one that it is.
    """
    best: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        name = row["implementation"] if row["mechanism"] == baseline else "fastest"
        key = row["mechanism"], name, row["pass"], row["length"]
        so_far = best.get(key, {}).get("milliseconds", math.inf)
        if key not in best or row.get("milliseconds", math.inf) < so_far:
            best[key] = row | {"implementation": name, "by": row["implementation"]}
    return list(best.values())


def crossovers(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """From which lengths on mechanisms are faster than each implementation of the baseline.

    Args:
      rows: from `fastest`.
      baseline: a mechanism.

    Returns:
      For every other mechanism and pass, if the baseline has times of it, an entry whose
      `crossover` is by the name of every implementation of the baseline, as of `growth`.
    """
    times: dict[tuple, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["length"]):
        own = times.setdefault(tuple(row[name] for name in SERIES), {})
        own[row["length"]] = row.get("milliseconds", math.inf)
    entries = []
    for (mechanism, _, kind), own in times.items():
        rivals = {
            name: {n: other.get(n, math.inf) for n in own}
            for (rival, name, of), other in times.items()
            if (rival, of) == (baseline, kind) and min(other.values()) < math.inf
        }
        if mechanism != baseline and rivals:
            found = {name: crossover(own, other) for name, other in rivals.items()}
            entry = {"mechanism": mechanism, "pass": kind, "baseline": baseline}
            entries.append(entry | {"crossover": found})
    return entries


def line(times: Mapping[int, float]) -> dict[str, float]:
    """The straight line through `times` by length, and the exponent at their end."""
    if len(times) < 3:
        return {}
    lengths, values = np.array(list(times)), np.array(list(times.values()))
    slope, start = np.polyfit(lengths, values, 1)
    rest = np.sum((values - start - slope * lengths) ** 2)
    exponent = np.log(values[-1] / values[-2]) / np.log(lengths[-1] / lengths[-2])
    return {
        "milliseconds_per_1024": float(1024 * slope),
        "r_squared": float(1 - rest / max(np.sum((values - values.mean()) ** 2), 1e-30)),
        "exponent": float(exponent),
    }


def crossover(times: Mapping[int, float], baseline: Mapping[int, float]) -> float | None:
    """The length from which on `times` stay below the baseline's, both by rising lengths."""
    gaps = [
        (n, -math.inf if baseline[n] == math.inf > t else math.log(t / baseline[n]))
        for n, t in times.items()
        if t < math.inf or baseline[n] < math.inf
    ]
    above = [i for i, (_, gap) in enumerate(gaps) if gap >= 0]
    if not above:
        return float(gaps[0][0])
    last = above[-1]
    if last == len(gaps) - 1:
        return None
    (n, gap), (further, below) = gaps[last : last + 2]
    if not math.isfinite(below) or not math.isfinite(gap):
        return float(further)
    return float(n * (further / n) ** (gap / (gap - below)))
