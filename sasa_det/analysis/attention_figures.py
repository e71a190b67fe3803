"""Attention drawn over the picture it belongs to. Pages are as wide and at most as high as A4."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sasa_det.layers.recording import AttentionLayer

from .attention import Extent, Look, Window

PAGE_WIDTH, PAGE_HEIGHT = 8.27, 11.69  # inches
MAX_COLUMNS = 6
DPI = 130
HEAT, DIFFERENCE = "YlOrRd", "RdBu_r"
MARK = "#00e5ff"  # of points, windows and boxes: in none of the two colour maps
# How much of the picture is shown around a window, in sides of the window.
SURROUNDINGS = 2.2


class Point(NamedTuple):
    """Where attention is looked at, in pixels of the picture."""

    x: float
    y: float
    box: tuple[float, float, float, float] | None = None  # of the detection whose centre it is
    label: str = ""


class View(NamedTuple):
    """A part of a page: what a model attends to from a point."""

    title: str
    point: Point
    window: Window


def draw_heads(picture: np.ndarray, views: Sequence[View], title: str, path: Path) -> list[Path]:
    """For each view the picture, then what all heads on average and each head attends to.

    Colours are comparable within a view's point: the strongest weight any of its views has there is
    the darkest.

    Args:
        picture (uint8 array (H, W, 3)): RGB.
        views: in the order in which they are drawn; those of a point one after another.
        title (str): stands on top of each page.
        path (Path): of the PNG; where one page is not enough, of the first, and "_2", "_3"
            follow.

    Returns:
        list[Path]: what was written.
    """
    pyplot = _pyplot()
    num_cells = 2 + len(views[0].window.weights)
    lines = -(-num_cells // MAX_COLUMNS)
    columns = -(-num_cells // lines)
    aspect = min(max(picture.shape[0] / picture.shape[1], 0.6), 1.4)
    height = PAGE_WIDTH / columns * aspect + 0.22
    per_page = max(1, int((PAGE_HEIGHT - 0.6) / (height * lines)))
    paths = []
    for page, start in enumerate(range(0, len(views), per_page), start=1):
        shown = views[start : start + per_page]
        rows = len(shown) * lines
        size = (PAGE_WIDTH, height * rows + 0.4)
        figure, axes = pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        for axis in axes.flat:
            axis.axis("off")
        for view, cells in zip(shown, axes.reshape(len(shown), -1)):
            strongest = max(v.window.weights.max() for v in views if v.point == view.point)
            _draw_view(cells, picture, view, strongest)
        figure.suptitle(title, fontsize=9)
        paths.append(path if page == 1 else path.with_stem(f"{path.stem}_{page}"))
        figure.savefig(paths[-1], dpi=DPI)
        pyplot.close(figure)
    return paths


def _draw_view(cells: Sequence[Any], picture: np.ndarray, view: View, strongest: float) -> None:
    point, window = view.point, view.window
    crop = enlarged(window.extent, picture.shape[:2])
    first, *others = cells
    first.imshow(picture)
    if point.box is not None:
        draw_box(first, point.box, point.label)
    if crop != whole(picture.shape[:2]):
        _outline(first, crop, "white", 1)
    first.plot(point.x, point.y, "+", color=MARK, markersize=8, markeredgewidth=1.6)
    first.set_xlim(0, picture.shape[1])
    first.set_ylim(picture.shape[0], 0)
    first.set_title(view.title, fontsize=7, fontweight="bold")
    named = [("all heads", window.weights.mean(axis=0))]
    named += [(f"head {i}", weights) for i, weights in enumerate(window.weights, start=1)]
    for axis, (name, weights) in zip(others, named):
        draw_window(axis, picture, weights, window.extent, strongest)
        axis.plot(point.x, point.y, "+", color=MARK, markersize=6, markeredgewidth=1.2)
        axis.set_xlim(crop[0], crop[1])
        axis.set_ylim(crop[2], crop[3])
        axis.set_title(f"{name}: at most {weights.max():.0%}", fontsize=7)


def draw_window(
    axis: Any, picture: np.ndarray, weights: np.ndarray, extent: Extent, strongest: float
) -> None:
    """A head's weights (k, k) over the picture in grey, the darker the stronger."""
    height, width = picture.shape[:2]
    grey = 90 + picture.mean(axis=2) * (165 / 255)  # paler, so that the heat stands out
    axis.imshow(grey, cmap="gray", vmin=0, vmax=255)
    strength = weights / strongest
    # The picture shows through where little is looked at.
    heat = {"cmap": HEAT, "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    axis.imshow(strength, extent=extent, alpha=0.9 * np.sqrt(strength), **heat)
    _outline(axis, extent, MARK, 0.8)
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)


def draw_box(axis: Any, box: Sequence[float], label: str) -> None:
    """A detection (left, top, right, bottom) with its label, on a picture that is drawn already."""
    left, top, right, bottom = box
    _outline(axis, (left, right, bottom, top), MARK, 1.5)
    style = {"facecolor": MARK, "edgecolor": "none", "pad": 1}
    at_the_top = top < 0.12 * max(axis.get_ylim())
    side = "top" if at_the_top else "bottom"  # of the label, which is to stay on the picture
    axis.text(left, top, label, fontsize=7, va=side, bbox=style, clip_on=True)


def _outline(axis: Any, extent: Extent, colour: str, width: float) -> None:
    from matplotlib.patches import Rectangle

    left, right, bottom, top = extent
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour)
    frame.set_linewidth(width)
    axis.add_patch(frame)


def whole(size: tuple[int, ...]) -> Extent:
    """Of a picture (height, width)."""
    return 0.0, float(size[1]), float(size[0]), 0.0


def enlarged(window: Extent, size: tuple[int, ...]) -> Extent:
    """The part of a picture (height, width) that shows a window with some surroundings."""
    left, right, bottom, top = window
    side = SURROUNDINGS * max(right - left, bottom - top)
    if side > min(size[:2]):
        return whole(size)
    x = min(max((left + right - side) / 2, 0), size[1] - side)
    y = min(max((top + bottom - side) / 2, 0), size[0] - side)
    return x, x + side, y + side, y


def draw_layers(picture: np.ndarray, look: Look, title: str, path: Path) -> Path:
    """Every layer's averaged map: how much each place is attended to, over the picture."""
    pyplot = _pyplot()
    maps: Mapping[str, Tensor] = look.received
    columns = min(MAX_COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    height = PAGE_WIDTH / columns * picture.shape[0] / picture.shape[1] + 0.22
    size = (PAGE_WIDTH, min(height * rows + 0.8, PAGE_HEIGHT))
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, received) in zip(axes.flat, maps.items()):
        axis.imshow(picture.mean(axis=2), cmap="gray", vmin=0, vmax=255)
        heat = {"cmap": DIFFERENCE, "vmin": 0, "vmax": 2, "interpolation": "nearest"}
        shown = axis.imshow(received, extent=look.extent(received.shape), alpha=0.7, **heat)
        axis.set_xlim(0, picture.shape[1])
        axis.set_ylim(picture.shape[0], 0)
        axis.set_title(short_name(name), fontsize=7)
    bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.02)
    bar.set_ticks([0, 1, 2], labels=["never", "as if all attended uniformly", "twice that or more"])
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def draw_embeddings(layers: Mapping[str, AttentionLayer], title: str, path: Path) -> Path:
    """The learned row and column embeddings of each head.

    Args:
        layers: by what their rows of the page are called; all with relative positions.
        title (str): stands on top.
        path (Path): of the PNG.
    """
    pyplot = _pyplot()
    tensors = [
        (f"{label} {kind}".strip(), table.detach().float().cpu().numpy())
        for label, layer in layers.items()
        for kind, table in (("rows", layer.rel_rows), ("columns", layer.rel_cols))
        if table is not None
    ]
    largest = max(float(np.abs(table).max()) for _, table in tensors)
    heads, offsets, channels = tensors[0][1].shape
    size = (PAGE_WIDTH, min(1.5 * len(tensors) + 0.8, PAGE_HEIGHT))
    figure, axes = pyplot.subplots(
        len(tensors), heads, figsize=size, layout="constrained", squeeze=False
    )
    radius = offsets // 2
    for cells, (label, table) in zip(axes, tensors):
        for head, axis in enumerate(cells):
            shown = axis.imshow(
                table[head], cmap=DIFFERENCE, vmin=-largest, vmax=largest, aspect="auto"
            )
            axis.set_xticks([])
            axis.set_yticks([0, radius, offsets - 1], [f"{-radius}", "0", f"+{radius}"], fontsize=7)
            axis.set_title(f"head {head + 1}", fontsize=7)
        cells[0].set_ylabel(label, fontsize=7)
        cells[0].set_xlabel(f"{channels} channels", fontsize=7)
    figure.colorbar(shown, ax=axes, shrink=0.6, aspect=40, pad=0.01).ax.tick_params(labelsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def short_name(layer: str) -> str:
    """What tells a layer from the others of a detector."""
    return layer.removeprefix("backbone.").removeprefix("bottom_up.").removesuffix(".attention")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
