"""Accuracy against cost, drawn: what the paper published and what runs measured."""

from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

from .charts import COLOURS
from .reproduction import Row, Table

MARKERS = "osD^vP*X"


class Point(NamedTuple):
    """Costs in GFLOPs and millions of parameters; the error is half the length of the bar.

    The scale is what was trained at; None where the point is the paper's.
    """

    row: Row
    costs: tuple[float, float]
    accuracy: float
    error: float
    scale: str | None


def draw_tradeoff(tables: Sequence[Table], file: BinaryIO) -> bool:
    """A PNG: accuracy against GFLOPs, on the left, and against parameters, on the right.

    A line of panels for each table, or two where what was measured is not of the paper's dataset.
    Returns whether there was anything to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for table in tables for panel in _panels(table)]
    if not panels:
        return False
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = pyplot.figure(figsize=(12, 4 * len(panels)), layout="constrained")
        lines = figure.subfigures(len(panels), 1, squeeze=False)[:, 0]
        for line, (table, points, title) in zip(lines, panels):
            line.suptitle(title, fontsize=11)
            _draw(line.subplots(1, 2), table, points)
        figure.savefig(file, dpi=110, format="png")
        pyplot.close(figure)
    return True


def _panels(table: Table) -> list[tuple[Table, list[Point], str]]:
    """Tables with the points of a line of panels and its title."""
    published, measured = _published(table), _measured(table)
    scales = " or ".join(sorted({point.scale for point in measured if point.scale}))
    ours = f"measured on {table.dataset}, {scales}; bars: ± standard deviation"
    panels = []
    # The few rows of an ablation that the paper's Table 1 has are no picture of it.
    if table.paper_figures[0] == table.figures[0]:
        points, title = published, f"{table.title}: the paper's, {table.paper_dataset}"
        if measured and table.comparable:
            points, title = [*published, *measured], f"{title}; {ours}"
        panels.append((table, points, title))
    if measured and not (panels and table.comparable):
        panels.append((table, measured, f"{table.title.split(':')[0]}: {ours}"))
    return panels


def _published(table: Table) -> list[Point]:
    points = []
    for row in table.rows:
        names = ("gflops", "params_m", table.paper_figures[0])
        gflops, params, accuracy = (row.published(name) for name in names)
        if gflops is not None and params is not None and accuracy is not None:
            points.append(Point(row, (gflops, params), accuracy, 0, None))
    return points


def _measured(table: Table) -> list[Point]:
    points = []
    for row in table.rows:
        spread, counted = table.measured(row, table.figures[0]), row.counted_as_trained
        if spread is not None and counted is not None:
            costs = counted.cost.flops_paper / 1e9, counted.cost.params / 1e6
            points.append(Point(row, costs, spread.mean, spread.deviation or 0, counted.scale))
    return points


def _draw(pair: Sequence[Any], table: Table, points: Sequence[Point]) -> None:
    # Rows with the same first label are one family, of several sizes.
    families = list(dict.fromkeys(next(iter(row.labels.values())) for row in table.rows))
    for panel, axis, x_label in zip(pair, (0, 1), ("GFLOPs", "parameters (M)")):
        for index, family in enumerate(families):
            colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            for is_ours in (False, True):
                family_points = [
                    point
                    for point in points
                    if (point.scale is not None) == is_ours
                    and next(iter(point.row.labels.values())) == family
                ]
                if family_points:
                    panel.errorbar(
                        [point.costs[axis] for point in family_points],
                        [point.accuracy for point in family_points],
                        yerr=[point.error for point in family_points] if is_ours else None,
                        color=colour,
                        marker=marker,
                        markersize=8,
                        markerfacecolor=colour if is_ours else "white",
                        capsize=3,
                        linewidth=1.2,
                        label=f"{family}, {'measured' if is_ours else 'paper'}",
                    )
        panel.set_xlabel(x_label)
        panel.set_ylabel(table.figures[0])
        panel.grid(color="#e6e6e6")
        panel.margins(0.1)
    pair[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=9)
