"""Time and memory of a layer against the size of its map and of its window, drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .comparison import Comparison
from .report import Figure, mebibytes, median, milliseconds
from .workloads import CONVOLUTION, OURS

COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
FORCED_COLOUR = "#b0a08c"


def draw_scaling(
    by_size: Sequence[Comparison], by_window: Sequence[Comparison], title: str, path: Path
) -> None:
    """Four panels, both axes logarithmic, a line an implementation.

    Args:
        by_size: comparisons that differ in the map's height and width.
        by_window: comparisons that differ in kernel_size.
        title (str): what all of them share.
        path (Path): the PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = dict.fromkeys(r.implementation for c in (*by_size, *by_window) for r in c.rows)
    colours = _colours(list(names))
    with pyplot.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
        columns: list[tuple[Sequence[Comparison], Callable[[Comparison], int], str]] = [
            (by_size, lambda c: c.case["height"] * c.case["width"], "positions H·W of the map"),
            (by_window, lambda c: c.case["kernel_size"], "side k of the window"),
        ]
        quantities: list[tuple[Figure, str]] = [
            (milliseconds, "time (ms)"),
            (mebibytes, "peak memory (MiB)"),
        ]
        for row, (quantity, y_label) in zip(axes, quantities):
            for panel, (comparisons, abscissa, x_label) in zip(row, columns):
                _draw_panel(panel, comparisons, abscissa, quantity, colours)
                panel.set_ylabel(y_label)
                panel.set_xlabel(x_label)
        _label_sizes(axes[:, 0], by_size)
        figure.suptitle(title, fontsize=11)
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _draw_panel(
    panel: Any,
    comparisons: Sequence[Comparison],
    abscissa: Callable[[Comparison], int],
    figure: Figure,
    colours: dict[str, str],
) -> None:
    panel.set_xscale("log")
    panel.set_yscale("log")
    ends = []
    for name, colour in colours.items():
        values = [(abscissa(c), figure(c, name)) for c in comparisons]
        points = [(x, median(y)) for x, y in values if y is not None and median(y) > 0]
        if not points:
            continue
        width = 2.6 if name == OURS else 1.4
        panel.plot(*zip(*points), color=colour, linewidth=width, marker="o", markersize=width + 2)
        if points[-1][0] == values[-1][0]:
            ends.append((points[-1][1], name))
        else:  # it could not run on: named where its line ends
            place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
            panel.annotate(name, points[-1], color=colour, **place)
    panel.margins(y=0.1)
    panel.set_xticks(sorted({abscissa(c) for c in comparisons}))
    panel.minorticks_off()
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:,.6g}")
    panel.grid(axis="y", color="#e6e6e6")
    _label_ends(panel, ends, colours)


def _label_ends(panel: Any, ends: list[tuple[float, str]], colours: dict[str, str]) -> None:
    """Names right of the lines, moved apart where they would overlap."""
    if not ends:
        return
    ends = sorted(ends)
    to_axes = panel.transData + panel.transAxes.inverted()
    heights = [to_axes.transform((panel.get_xlim()[1], y))[1] for y, _ in ends]
    gap = 0.062
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for (_, name), height in zip(ends, heights):
        panel.annotate(
            name,
            (1.02, height),
            xycoords="axes fraction",
            va="center",
            color=colours[name],
            fontweight="bold" if name == OURS else "normal",
            annotation_clip=False,
        )


def _label_sizes(panels: Sequence[Any], comparisons: Sequence[Comparison]) -> None:
    sizes = {c.case["height"] * c.case["width"]: c.case for c in comparisons}
    for panel in panels:
        labels = [f"{c['height']}x{c['width']}" for _, c in sorted(sizes.items())]
        panel.set_xticks(sorted(sizes), labels)


def _colours(names: Sequence[str]) -> dict[str, str]:
    """Fixed for the two that matter most, a neutral one for our other backends."""
    colours, rest = {OURS: COLOURS[0], CONVOLUTION: "#333333"}, iter(COLOURS[1:])
    for name in names:
        if name not in colours:
            forced = name.startswith(f"{OURS} (")
            colours[name] = FORCED_COLOUR if forced else next(rest, FORCED_COLOUR)
    return {name: colours[name] for name in names}
