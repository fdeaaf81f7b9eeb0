"""How fast programs are beside each other: of another implementation, and of the plain program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SHAPE = "pass", "length", "batch", "heads", "head_dim"


def ratios(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One entry for every program, implementation, shape and pass that has a time.

    Args:
      rows: of a benchmark: what identifies a case, `plain`, `milliseconds` and
        `teraflops_per_second`, or an `error`.

    Returns:
      Entries of what identifies the case and
      of_plain: its FLOP/s over those of the `plain` program by the same implementation, both of the
        pairs that their masks allow; None if that has no time. Of a sparse mask it is the share of
        the speed-up over dense attention that the number of pairs allows.
      times_faster: by the name of every other implementation with a time, that over its own.
    """
    timed = [row for row in rows if "milliseconds" in row]
    found = {_key(row): row for row in timed}
    entries = []
    for row in timed:
        plain = found.get(_key(row | {"mechanism": row["plain"]}))
        rivals = [
            other
            for other in timed
            if other["implementation"] != row["implementation"]
            and _key(other | {"implementation": row["implementation"]}) == _key(row)
        ]
        rate = "teraflops_per_second"
        entries.append(
            {name: row[name] for name in ("mechanism", "implementation", *SHAPE)}
            | {
                "of_plain": row[rate] / plain[rate] if plain else None,
                "times_faster": {
                    other["implementation"]: other["milliseconds"] / row["milliseconds"]
                    for other in rivals
                },
            }
        )
    return entries


def _key(row):
    return tuple(row[name] for name in ("mechanism", "implementation", *SHAPE))
