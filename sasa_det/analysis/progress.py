"""How far trainings are, from the metrics.json that each writes, and how long they will take."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from .runs import CONFIG_FILE, METRICS_FILE, read_run

# Of a training step, forward and backward of an image, which its evaluation takes.
EVALUATION_COST = 1 / 3
# Where and how fast a run is trained, not what: they may change when it is continued.
NOT_COMPARED = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS")


class PlannedRun(NamedTuple):
    """A row of a table with a seed.

    Attributes:
        row (str): what is trained.
        seed (int): the SEED.
        folder (Path): its OUTPUT_DIR.
        overrides: [KEY, VALUE, ...] that make the config of all rows this run's.
        cfg (CfgNode): the result.
    """

    row: str
    seed: int
    folder: Path
    overrides: list[str]
    cfg: CfgNode

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"

    @property
    def steps(self) -> int:
        return self.cfg.SOLVER.MAX_ITER

    def is_finished(self) -> bool:
        """Whether its folder holds the figures of the whole training.

        Raises:
            ValueError: in one sentence, if it holds a run of another config, finished or not.
        """
        if not (self.folder / CONFIG_FILE).is_file():
            return False
        run = read_run(self.folder)
        asked, found = (yaml.safe_load(cfg.dump()) for cfg in (self.cfg, run.cfg))
        if Path(run.cfg.MODEL.WEIGHTS).parent == Path(run.cfg.OUTPUT_DIR):
            # Evaluating a run's own checkpoint wrote it there.
            found["MODEL"]["WEIGHTS"] = self.cfg.MODEL.WEIGHTS
        for key, wanted, value in _differences(asked, found):
            if key not in NOT_COMPARED:
                raise ValueError(
                    f"{str(self.folder)!r} holds a run with {key} {value}, not {wanted}: give "
                    "another --output, or move that folder away."
                )
        return run.unfinished is None

    def figures(self) -> dict[str, float | None]:
        """Of the finished run, on the first dataset of DATASETS.TEST."""
        return read_run(self.folder).figures(self.cfg.DATASETS.TEST[0])

    def steps_saved(self) -> int:
        """The steps of the last checkpoint, from which the run would continue."""
        last = self.folder / "last_checkpoint"
        name = last.read_text() if last.is_file() else ""
        if "final" in name:
            return self.steps
        iteration = re.search(r"\d+", name)
        return int(iteration[0]) + 1 if iteration else 0


class Pace:
    """Seconds a training step takes, by row; what they say about the time that is left.

    Args:
        at_once (int): runs at the same time.

    Attributes:
        of_row: the seconds, of those rows that were timed.
        start_up (float): seconds from the start of a run to its first step.
    """

    def __init__(self, at_once: int) -> None:
        self.at_once = at_once
        self.of_row: dict[str, float] = {}
        self.start_up = 0.0
        self._test_images: dict[str, int] = {}

    def seconds(self, run: PlannedRun, steps_done: int) -> float | None:
        """From there to the end, evaluations too. None where no row's pace is known.

        A row without a pace of its own takes the mean of the others.
        """
        if not self.of_row:
            return None
        pace = self.of_row.get(run.row, sum(self.of_row.values()) / len(self.of_row))
        period = run.cfg.TEST.EVAL_PERIOD
        ends = {run.steps, *(range(period, run.steps, period) if period > 0 else ())}
        evaluations = sum(end >= max(steps_done, 1) for end in ends)
        images = evaluations * self._images(run.cfg.DATASETS.TEST[0])
        evaluation_steps = EVALUATION_COST * images / run.cfg.SOLVER.IMS_PER_BATCH
        return pace * (run.steps - steps_done + evaluation_steps)

    def left(
        self, running: Sequence[tuple[PlannedRun, int]], waiting: Sequence[PlannedRun]
    ) -> float | None:
        """Seconds until all have ended, each started as soon as there is room; None if unknown.

        Args:
            running: with the steps that each has done.
            waiting: in their order; they continue from their last checkpoints.
        """
        if not self.of_row:
            return None
        ends = [self.seconds(run, steps) or 0.0 for run, steps in running]
        ends += [0.0] * (self.at_once - len(ends))
        for run in waiting:
            ends.sort()
            ends[0] += self.start_up + (self.seconds(run, run.steps_saved()) or 0.0)
        return max(ends)

    def _images(self, dataset: str) -> int:
        if dataset not in self._test_images:
            self._test_images[dataset] = len(DatasetCatalog.get(dataset))
        return self._test_images[dataset]


def last_metrics(folder: Path, offset: int = 0) -> dict[str, Any]:
    """What a training last logged, behind so many bytes of its log; empty if nothing yet."""
    log = folder / METRICS_FILE
    entry: dict[str, Any] = {}
    for line in log.read_bytes()[offset:].splitlines() if log.is_file() else []:
        try:
            entry |= json.loads(line)
        except ValueError:
            continue  # it is being written
    return entry


def duration(seconds: float | None) -> str:
    """``seconds`` for a reader: 40 s, 12 min, 3 h 20 min."""
    if seconds is None:
        return "unknown time"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _differences(asked: Any, found: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, asked, found) of what is not the same."""
    for key in asked.keys() | found.keys():
        values = asked.get(key), found.get(key)
        if all(isinstance(value, dict) for value in values):
            yield from _differences(*values, f"{prefix}{key}.")
        elif values[0] != values[1]:
            yield f"{prefix}{key}", *values
