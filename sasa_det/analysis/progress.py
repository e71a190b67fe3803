"""How far trainings are, from the metrics.json that each writes, and how long they will take."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from .runs import METRICS_FILE

# Of a training step, forward and backward of an image, which its evaluation takes.
EVALUATION_COST = 1 / 3


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
        """Seconds until all have ended, each started as soon as there is room.

        Args:
            running: with the steps that each has done.
            waiting: in their order; they continue from their last checkpoints.
        """
        now = [self.seconds(run, steps) for run, steps in running]
        later = [self.seconds(run, run.steps_saved()) for run in waiting]
        ends = [end for end in now if end is not None]
        ends += [0.0] * (self.at_once - len(ends))
        for seconds in later:
            if seconds is None:
                return None
            ends.sort()
            ends[0] += self.start_up + seconds
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
