"""One row for every mechanism: the table that tests, benchmarks, experiments and docs read.

`python -m attn_lab.catalogue README.md` writes the table of mechanisms into that file.
"""

from attn_lab.catalogue import (
    attention,
    attention_free,
    heads,
    linear_kernels,
    linear_states,
    linear_weights,
    masks,
    memories,
    moving_averages,
    normalizers,
    positions,
    recurrence,
    scores,
)
from attn_lab.catalogue.mechanism import KINDS, Mechanism, Sizes

START, END = "<!-- mechanisms: start -->", "<!-- mechanisms: end -->"

CATALOGUE: tuple[Mechanism, ...] = (
    *attention.ROWS,
    *normalizers.ROWS,
    *scores.ROWS,
    *heads.ROWS,
    *recurrence.ROWS,
    *linear_weights.ROWS,
    *linear_kernels.ROWS,
    *linear_states.ROWS,
    *memories.ROWS,
    *moving_averages.ROWS,
    *attention_free.ROWS,
    *masks.ROWS,
    *positions.ROWS,
)


def find(name: str) -> Mechanism:
    """The row called `name`; ValueError with the known names if there is none."""
    rows = {row.name: row for row in CATALOGUE}
    if name not in rows:
        raise ValueError(f"mechanism {name!r} is unknown; choose one of {', '.join(rows)}")
    return rows[name]


def table() -> str:
    """The catalogue as a Markdown table."""
    lines = ["| mechanism | what it computes | paper |", "| --- | --- | --- |"]
    for row in CATALOGUE:
        link = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
        paper = f"{link}, {row.year}"
        name = row.function.__name__
        called = f"`{row.name}`" + (f" (`ops.{name}`)" if name != row.name else "")
        summary = row.summary.replace("|", "\\|")
        lines.append(f"| {called} | {summary} | {paper} |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the present table between the marks."""
    if START not in text or END not in text:
        raise ValueError(f"the text must hold the lines {START} and {END}")
    before, rest = text.split(START)
    return f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"


__all__ = ["CATALOGUE", "KINDS", "Mechanism", "Sizes", "find", "table", "with_table"]
