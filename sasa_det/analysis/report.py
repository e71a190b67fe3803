"""Comparisons as Markdown tables and as data."""

from collections.abc import Callable, Sequence
from typing import Any

from tabulate import tabulate

from .comparison import Comparison, Row
from .timing import Spread

NOT_MEASURED = "-"
MIB = 2**20

# What a comparison says of an implementation, by name; None where it was not measured.
Figure = Callable[[Comparison, str], Spread | float | None]


def comparison_table(comparison: Comparison) -> str:
    """One line an implementation: ratios, then time, peak memory and the fastest format."""
    ours = comparison.ours
    headers = ["", f"time ÷ {comparison.baseline}", *([f"time ÷ {ours}"] if ours else [])]
    headers += [f"memory ÷ {comparison.baseline}", "time (ms)", "peak memory (MiB)"]
    whole = comparison.every_row
    headers += [*(["whole process (MiB)"] if whole else []), "memory format", "backend"]
    lines = []
    for row in comparison.shown_rows():
        if row.failure is not None:
            line = [row.implementation, row.failure] + [NOT_MEASURED] * (len(headers) - 4)
            lines.append([*line, row.memory_format if whole else NOT_MEASURED, row.backend or ""])
            continue
        memory = row.memory
        line = [row.implementation, cell(comparison.time_ratio(row))]
        if ours:
            line.append(cell(comparison.time_ratio(row, ours)))
        line.append(cell(comparison.memory_ratio(row)))
        line.append(cell(_scaled(row.time, 1000)))
        line.append(cell(memory and memory.step / MIB))
        if whole:
            line.append(cell(memory and memory.total / MIB))
        lines.append([*line, row.memory_format, row.backend or ""])
    return markdown_table(lines, headers)


def grid_table(
    comparisons: Sequence[Comparison],
    labels: Sequence[str],
    figure: Figure,
    *,
    first: str,
    growth: bool = False,
) -> str:
    """One line a case, one column an implementation.

    Args:
        labels: the name of each case.
        figure: what stands in the cells.
        first (str): heads the column of the labels.
        growth (bool): a last line with the largest figure of a column over its smallest.
    """
    names = list(dict.fromkeys(r.implementation for c in comparisons for r in c.rows))
    table = [[figure(comparison, name) for name in names] for comparison in comparisons]
    lines = [[label, *map(cell, line)] for label, line in zip(labels, table)]
    if growth:
        columns = [[median(x) for x in column if x is not None] for column in zip(*table)]
        ratios = [max(x) / min(x) if len(x) > 1 and min(x) > 0 else None for x in columns]
        lines.append(["largest ÷ smallest", *map(cell, ratios)])
    return markdown_table(lines, [first, *names])


def time_ratio(comparison: Comparison, name: str) -> Spread | None:
    return comparison.time_ratio(comparison.best(name))


def memory_ratio(comparison: Comparison, name: str) -> float | None:
    return comparison.memory_ratio(comparison.best(name))


def milliseconds(comparison: Comparison, name: str) -> Spread | None:
    row = comparison.best(name)
    return None if row is None else _scaled(row.time, 1000)


def nanoseconds_a_position(comparison: Comparison, name: str) -> Spread | None:
    row = comparison.best(name)
    return None if row is None else _scaled(row.time, 1e9 / positions(comparison))


def mebibytes(comparison: Comparison, name: str) -> float | None:
    row = comparison.best(name)
    return None if row is None or row.memory is None else row.memory.step / MIB


def positions(comparison: Comparison) -> int:
    """Of the maps of a batch."""
    case = comparison.case
    return case["batch"] * case["height"] * case["width"]


def as_data(comparison: Comparison) -> dict[str, Any]:
    """For JSON: seconds and bytes."""
    best = comparison.best(comparison.baseline)
    return {
        "suite": comparison.suite,
        "title": comparison.title,
        "mode": comparison.mode,
        "case": comparison.case,
        "baseline": best and [best.implementation, best.memory_format],
        "rows": [_row_as_data(comparison, row) for row in comparison.rows],
    }


def _row_as_data(comparison: Comparison, row: Row) -> dict[str, Any]:
    ratio = comparison.time_ratio(row)
    ours = comparison.time_ratio(row, comparison.ours) if comparison.ours else None
    return {
        "implementation": row.implementation,
        "memory_format": row.memory_format,
        "backend": row.backend,
        "failure": row.failure,
        "time_ratio_to_baseline": ratio and ratio._asdict(),
        "time_ratio_to_ours": ours and ours._asdict(),
        "memory_ratio_to_baseline": comparison.memory_ratio(row),
        "seconds": row.time and row.time._asdict(),
        "seconds_of_each_round": row.seconds,
        "peak_memory_bytes": row.memory and row.memory._asdict(),
        "memory_failure": row.memory_failure,
    }


def cell(x: Spread | float | None) -> str:
    """Three digits, and the quartiles of a spread; a dash for what was not measured."""
    if x is None:
        return NOT_MEASURED
    if isinstance(x, Spread):
        return f"{cell(x.median)} ({cell(x.lower_quartile)} to {cell(x.upper_quartile)})"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def median(x: Spread | float) -> float:
    return x.median if isinstance(x, Spread) else x


def _scaled(x: Spread | None, factor: float) -> Spread | None:
    return None if x is None else Spread(*(factor * value for value in x))


def markdown_table(lines: Sequence[list], headers: Sequence[str], text_columns: int = 1) -> str:
    """The first ``text_columns`` to the left, the others to the right."""
    alignment = ["left"] * text_columns + ["right"] * (len(headers) - text_columns)
    return tabulate(
        lines, list(headers), tablefmt="pipe", disable_numparse=True, colalign=alignment
    )
