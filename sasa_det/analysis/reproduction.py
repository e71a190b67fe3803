"""The paper's tables beside what is counted on this package's models and measured in its runs."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from sasa_det.modeling import make_sasa_resnet

from .flops import ModelCost, count_detector, count_network
from .runs import Architecture, ClassifierRun, Run, architecture, differences, on_dataset, settings


class Counted(NamedTuple):
    """What a model costs; ``scale`` says of which input, classes and kind of model."""

    scale: str
    cost: ModelCost


class Trained(NamedTuple):
    """What a table needs to know of a run.

    Attributes:
        folder (Path): where it is.
        row: equals the ``key`` of the table's row that it trained.
        seed (int): negative for a random one.
        settings: what should be equal in a fair comparison.
        results: {dataset: {figure: value}}.
        cost: counts the model that was trained, at its own width and resolution.
    """

    folder: Path
    row: Any
    seed: int
    settings: dict[str, Any]
    results: dict[str, dict[str, float | None]]
    cost: Callable[[], Counted]


@dataclass
class Row:
    """A row of a table.

    Attributes:
        labels: what stands in its first columns, by their heads.
        key: see :attr:`Trained.row`.
        paper: "params_m", "gflops" and figures; what the paper may have but nobody found is None.
            None for a row that the paper does not have.
        count: counts the models of the row, at the paper's scale.
    """

    labels: dict[str, str]
    key: Any
    paper: dict[str, float | None] | None
    count: Callable[[], list[Counted]]
    runs: list[Trained] = field(default_factory=list)

    @property
    def name(self) -> str:
        return ", ".join(self.labels.values())

    @cached_property
    def counted(self) -> list[Counted]:
        return self.count()

    @cached_property
    def counted_as_trained(self) -> Counted | None:
        return self.runs[0].cost() if self.runs else None

    def published(self, figure: str) -> float | None:
        return (self.paper or {}).get(figure)

    def deviations(self) -> dict[str, float]:
        """Of what is counted from what is published: 0.01 is one percent more."""
        cost = self.counted[0].cost
        ours = {"params_m": cost.params / 1e6, "gflops": cost.flops_paper / 1e9}
        pairs = ((name, value, self.published(name)) for name, value in ours.items())
        return {name: value / theirs - 1 for name, value, theirs in pairs if theirs}


class Spread(NamedTuple):
    """Mean and sample standard deviation, None for a single seed."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass
class Table:
    """A table and the runs in it.

    Attributes:
        title (str): what it is, and where in the paper.
        figures: the figures that runs are measured by.
        dataset (str): what runs were evaluated on.
        paper_dataset (str): what the paper's figures are of.
        warnings: one sentence each.
    """

    title: str
    rows: list[Row]
    figures: tuple[str, ...]
    dataset: str
    paper_dataset: str
    paper_figures: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)

    @property
    def comparable(self) -> bool:
        """Whether measured figures may be subtracted from published ones."""
        return self.dataset == self.paper_dataset

    def add(self, runs: Sequence[Trained]) -> list[Trained]:
        """Puts the runs where they belong and returns those that belong nowhere.

        Raises:
            ValueError: for a run of a row that was evaluated on other datasets only, or for two
                runs of one row that are not two seeds of the same training.
        """
        rest = []
        for run in runs:
            row = next((row for row in self.rows if row.key == run.row), None)
            if row is None:
                rest.append(run)
                continue
            on_dataset(run.folder, run.results, self.dataset)
            if row.runs:
                _check_seeds(row, row.runs[0], run)
            row.runs.append(run)
        different = differences([row.runs[0].settings for row in self.rows if row.runs])
        if different:
            named = "; ".join(f"{key}: {_either(values)}" for key, values in different.items())
            self.warnings.append(f"The rows' runs differ in more than the rows do: {named}.")
        for row in self.rows:
            seeds = [run.seed for run in row.runs if run.seed >= 0]
            if len(set(seeds)) < len(seeds):
                self.warnings.append(f"Runs of the row {row.name} have the same seed: {seeds}.")
        return rest

    def measured(self, row: Row, figure: str) -> Spread | None:
        """Over the seeds of a row; None where there is nothing."""
        values = [run.results[self.dataset].get(figure) for run in row.runs]
        known = [value for value in values if value is not None]
        if not known:
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return Spread(statistics.fmean(known), deviation, len(known))

    def difference(self, row: Row, figure: str) -> float | None:
        """Measured minus published, where both are and are of the same dataset."""
        measured, published = self.measured(row, figure), row.published(figure)
        if not self.comparable or measured is None or published is None:
            return None
        return measured.mean - published


def _check_seeds(row: Row, first: Trained, second: Trained) -> None:
    different = differences([first.settings, second.settings])
    if different:
        key, values = next(iter(different.items()))
        raise ValueError(
            f"{str(first.folder)!r} and {str(second.folder)!r} are both {row.name}, but differ in "
            f"{key}: {_either(values)}; they are no two seeds of one training: leave one out."
        )


def _either(values: Sequence[Any]) -> str:
    return " or ".join(str(value) for value in values)


def trained_detector(run: Run, key: Callable[[Architecture], dict[str, Any]]) -> Trained:
    """``key`` gives what of its :class:`Architecture` makes it a run of a row."""
    detector = run.cfg.MODEL.META_ARCHITECTURE in ("SASARetinaNet", "RetinaNet")
    row = key(architecture(run.cfg))
    return Trained(
        folder=run.folder,
        row=row if detector else None,
        seed=run.cfg.SEED,
        settings=settings(run.cfg, tuple(row)),
        results={name: tasks.get("bbox", {}) for name, tasks in run.results.items()},
        cost=lambda: count_config(run.cfg, run.cfg.INPUT.MIN_SIZE_TEST),
    )


def classifier_key(depth: Any, stem: Any, attention_stages: Sequence[str]) -> dict[str, Any]:
    return {"depth": depth, "stem": stem, "attention_stages": tuple(attention_stages)}


def trained_classifier(run: ClassifierRun) -> Trained:
    """Of what its file says of the model, the row's part is what Table 1 varies."""
    model = {"kernel_size": 7, **run.model}
    stages = tuple(sorted(model.get("attention_stages", ("unknown",))))
    names = ("stem", "depth", "attention_stages", "seed", "epochs_trained")
    is_row = model["kernel_size"] == 7 and model.get("position", "relative") == "relative"
    return Trained(
        folder=run.folder,
        row=classifier_key(model.get("depth"), model.get("stem"), stages) if is_row else None,
        seed=model.get("seed", -1),
        settings={name: value for name, value in model.items() if name not in names},
        results=run.results,
        cost=lambda: _count_classifier(model),
    )


def _count_classifier(model: dict[str, Any]) -> Counted:
    width, size = model.get("width", 64), model.get("image_size", 224)
    classes = model.get("num_classes", 1000)
    resnet = make_sasa_resnet(
        depth=model["depth"],
        stem=model["stem"],
        attention_stages=model["attention_stages"],
        num_heads=model.get("num_heads", 8),
        stem_channels=width,
        bottleneck_channels=width,
        res2_channels=4 * width,
        num_classes=classes,
    )
    return Counted(f"{size}x{size}, {classes} classes", count_network(resnet, size))


def count_config(cfg: CfgNode, image_size: int) -> Counted:
    """The detector of a config on a square image, rounded up to what its FPN divides."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    divisor = model.backbone.size_divisibility or 1
    size = -(-image_size // divisor) * divisor
    scale = f"{size}x{size}, {cfg.MODEL.RETINANET.NUM_CLASSES} classes"
    return Counted(scale, count_detector(model, size).total)
