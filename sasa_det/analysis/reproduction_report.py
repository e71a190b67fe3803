"""Tables of a reproduction as Markdown, CSV and JSON: every figure with where it comes from."""

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from .flops import ModelCost
from .report import markdown_table
from .reproduction import Row, Spread, Table

NOT_MEASURED, NOT_FOUND, NOT_IN_PAPER = "not measured", "not found", "not in the paper"
# "on": the dataset, or the size and the classes that were counted with. "deviation": from the
# paper, of what is counted as a fraction, of what is measured as a difference.
CSV_COLUMNS = (
    *("table", "row", "figure", "source", "on", "value"),
    *("deviation", "standard deviation", "seeds"),
)
COSTS = {"params_m": "params (M)", "gflops": "GFLOPs"}
NOTES = """\
- paper: as published, {paper_dataset}; "not found": the figure was not at hand.
- counted: on this package's models, {scales}. GFLOPs are counted as the paper does, a multiply and
  an add being two; "executed" is what is computed, q . r factorised. Deviations are from the paper.
- measured: {measured}."""


def as_markdown(table: Table) -> str:
    """A section: notes, what models cost, how well they do, what they cost as they were trained."""
    parts = [f"## {table.title}", _notes(table), _cost_table(table), _accuracy_table(table)]
    if any(row.runs for row in table.rows):
        parts.append("Counted at the scale that was trained:")
        parts.append(_trained_table(table))
    parts += [f"**Warning:** {warning}" for warning in table.warnings]
    return "\n\n".join(parts)


def _notes(table: Table) -> str:
    scales = " and ".join(counted.scale for counted in table.rows[0].counted)
    measured = f"{table.dataset}, mean ± standard deviation over seeds"
    if not table.comparable:
        measured += f", which is not the paper's {table.paper_dataset}: no deviations"
    if not any(row.runs for row in table.rows):
        measured = "nothing; no run of these rows was given"
    return NOTES.format(paper_dataset=table.paper_dataset, scales=scales, measured=measured)


def _cost_table(table: Table) -> str:
    """The first scale is the paper's; what others there are follows."""
    headers = list(table.rows[0].labels)
    for name in COSTS.values():
        headers += [f"{name}, paper", f"{name}, counted", "deviation"]
    headers.append("GFLOPs, executed")
    for other in table.rows[0].counted[1:]:
        kind = other.scale.split(",")[0]
        headers += [f"{kind}: {name}, counted" for name in COSTS.values()]
    lines = []
    for row in table.rows:
        line, deviations = list(row.labels.values()), row.deviations()
        first, *others = [_as_millions(counted.cost) for counted in row.counted]
        for name in COSTS:
            # Not "-0.0%".
            deviation = f"{round(deviations[name], 3) + 0.0:+.1%}" if name in deviations else ""
            line += [_published(row, name), _cost(name, first), deviation]
        line.append(_cost("gflops", {"gflops": row.counted[0].cost.flops_executed / 1e9}))
        line += [_cost(name, other) for other in others for name in COSTS]
        lines.append(line)
    return markdown_table(lines, headers, len(table.rows[0].labels))


def _accuracy_table(table: Table) -> str:
    """Up to three lines a row: paper, measured and, where they can be compared, the difference."""
    names = list(dict.fromkeys([*table.paper_figures, *table.figures]))
    lines = []
    for row in table.rows:
        published = [_published(row, name) if name in table.paper_figures else "" for name in names]
        lines.append([*row.labels.values(), f"paper: {table.paper_dataset}", *published])
        blank = [""] * len(row.labels)
        spreads = {name: table.measured(row, name) for name in table.figures}
        measured = [cell(spreads[name]) if name in spreads else "" for name in names]
        seeds = f", seeds: {len(row.runs)}" if row.runs else ""
        lines.append([*blank, f"measured: {table.dataset}{seeds}", *measured])
        off = {name: table.difference(row, name) for name in names}
        if any(x is not None for x in off.values()):
            differences = ["" if x is None else f"{x:+.1f}" for x in off.values()]
            lines.append([*blank, "measured - paper", *differences])
    headers = [*table.rows[0].labels, "source"]
    return markdown_table(lines, [*headers, *names], len(headers))


def _trained_table(table: Table) -> str:
    lines = []
    for row in table.rows:
        counted = row.counted_as_trained
        if counted is None:
            lines.append([*row.labels.values(), NOT_MEASURED, "", "", ""])
            continue
        cost = counted.cost
        costs = (cost.params / 1e6, cost.flops_paper / 1e9, cost.flops_executed / 1e9)
        lines.append([*row.labels.values(), counted.scale, *(f"{x:.3g}" for x in costs)])
    headers = [*table.rows[0].labels, "trained at"]
    names = ["params (M)", "GFLOPs", "GFLOPs, executed"]
    return markdown_table(lines, [*headers, *names], len(headers))


def cell(spread: Spread | None) -> str:
    if spread is None:
        return NOT_MEASURED
    deviation = "" if spread.deviation is None else f" ± {spread.deviation:.1f}"
    return f"{spread.mean:.1f}{deviation}"


def _published(row: Row, name: str) -> str:
    if row.paper is None:
        return NOT_IN_PAPER
    value = row.published(name)
    return NOT_FOUND if value is None else f"{value:g}" if value >= 100 else f"{value:.1f}"


def _as_millions(cost: ModelCost) -> dict[str, float]:
    return {"params_m": cost.params / 1e6, "gflops": cost.flops_paper / 1e9}


def _cost(name: str, costs: dict[str, float]) -> str:
    value = costs[name]
    return f"{value:.2f}" if name == "params_m" or value < 20 else f"{value:.1f}"


def as_csv(tables: Sequence[Table]) -> str:
    """One line a figure, see :data:`CSV_COLUMNS`; where there is none, ``source`` says so."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for row in table.rows:
            for line in _figures(table, row):
                writer.writerow(["" if x is None else x for x in (table.title, row.name, *line)])
    return text.getvalue()


def _figures(table: Table, row: Row) -> Iterator[tuple[Any, ...]]:
    """What follows table and row in :data:`CSV_COLUMNS`."""
    for name in (*COSTS, *table.paper_figures):
        value = row.published(name)
        missing = NOT_IN_PAPER if row.paper is None else NOT_FOUND
        source = "paper" if value is not None else missing
        yield name, source, table.paper_dataset, value, None, None, None
    trained = row.counted_as_trained
    counted = [("counted", one) for one in row.counted]
    deviations = row.deviations()
    for source, one in [*counted, *([("counted as trained", trained)] if trained else [])]:
        executed = {"gflops_executed": one.cost.flops_executed / 1e9}
        for name, value in {**_as_millions(one.cost), **executed}.items():
            deviation = deviations.get(name) if one is row.counted[0] else None
            yield name, source, one.scale, value, deviation, None, None
    for name in table.figures:
        spread = table.measured(row, name)
        if spread is None:
            yield name, NOT_MEASURED, table.dataset, None, None, None, None
        else:
            mean, deviation, seeds = spread
            off = table.difference(row, name)
            yield name, "measured", table.dataset, mean, off, deviation, seeds


def as_data(table: Table) -> dict[str, Any]:
    """For JSON. FLOPs and parameters are whole numbers; the paper's are in units of 1e9 and 1e6."""
    return {
        "title": table.title,
        "dataset": table.dataset,
        "paper_dataset": table.paper_dataset,
        "warnings": table.warnings,
        "rows": [_row_as_data(table, row) for row in table.rows],
    }


def _row_as_data(table: Table, row: Row) -> dict[str, Any]:
    def counted_as_data(counted: Any) -> dict[str, Any] | None:
        return counted and {"scale": counted.scale, **counted.cost._asdict()}

    spreads = {name: table.measured(row, name) for name in table.figures}
    return {
        "labels": row.labels,
        "paper": row.paper,
        "counted": [counted_as_data(counted) for counted in row.counted],
        "deviation": row.deviations(),
        "measured": {name: x and x._asdict() for name, x in spreads.items()} if row.runs else None,
        "measured_minus_paper": {
            name: off for name in table.figures if (off := table.difference(row, name)) is not None
        },
        "counted_as_trained": counted_as_data(row.counted_as_trained),
        "runs": [
            {
                "folder": str(run.folder),
                "seed": run.seed,
                "dataset": table.dataset,
                "figures": run.results[table.dataset],
            }
            for run in row.runs
        ],
    }
