"""The paper's Table 2 from runs of our own: one line a row, its seeds together."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from sasa_det.evaluation import AP_NAMES

from .flops import ModelCost
from .paper import FPN_ROW, TABLE_2
from .report import NOT_MEASURED, markdown_table
from .reproduction import count_config

# (heads, backbone) of each row, at whatever depth; the last is beyond the paper.
ROWS = {row.config: (row.heads, row.backbone.removesuffix(" ResNet-50")) for row in TABLE_2}
ROWS[FPN_ROW[0]] = FPN_ROW[1:]


class RowResult(NamedTuple):
    """A row of the table.

    Attributes:
        row (str): its name, a key of :data:`ROWS`.
        cost (ModelCost): of the detector at the scale that was trained.
        figures: of each finished seed {"AP": ..., "AP50": ..., ...}; None where COCO has no figure.
    """

    row: str
    cost: ModelCost
    figures: Mapping[int, Mapping[str, float | None]]

    def values(self, name: str) -> list[float]:
        """The figure ``name`` of each seed that has it."""
        found = (figures.get(name) for figures in self.figures.values())
        return [value for value in found if value is not None]


def count_as_tested(cfg: CfgNode) -> ModelCost:
    """On a square of INPUT.MIN_SIZE_TEST pixels."""
    return count_config(cfg, cfg.INPUT.MIN_SIZE_TEST).cost


def as_markdown(results: Sequence[RowResult]) -> str:
    """A Markdown table; figures of several seeds as mean (least to greatest)."""
    headers = ["config", "heads", "backbone", "params (M)", "GFLOPs", "seeds", *AP_NAMES]
    lines = []
    for result in results:
        lines.append(
            [
                f"`{result.row}`",
                *ROWS[result.row],
                f"{result.cost.params / 1e6:.2f}",
                f"{result.cost.flops_executed / 1e9:.3g}",
                ", ".join(map(str, result.figures)) or NOT_MEASURED,
                *(cell(result.values(name)) for name in AP_NAMES),
            ]
        )
    return markdown_table(lines, headers, text_columns=3)


def as_data(results: Sequence[RowResult]) -> list[dict[str, Any]]:
    """For JSON: FLOPs of one image, a multiply and an add being two; the figures of each seed."""
    return [
        {
            "row": result.row,
            **result.cost._asdict(),
            "figures": {str(seed): dict(figures) for seed, figures in result.figures.items()},
            "mean": {
                name: sum(values) / len(values)
                for name in AP_NAMES
                if (values := result.values(name))
            },
        }
        for result in results
    ]


def cell(values: Iterable[float | None]) -> str:
    """Mean (least to greatest) of what COCO has a figure of; a dash for nothing."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_MEASURED
    mean = f"{sum(known) / len(known):.1f}"
    return mean if len(known) == 1 else f"{mean} ({min(known):.1f} to {max(known):.1f})"
