"""A comparison: contestants raced and weighed, and the ratios between them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .memory import PeakMemory, peak_memory
from .timing import Spread, free_memory, race, spread
from .workloads import Contestant


@dataclass
class Row:
    """What was measured of a contestant.

    Attributes:
        seconds (list[float]): of a step, from the first round on; empty where it could not run.
        failure (str or None): why it could not run.
        memory (PeakMemory or None): bytes; None where it was not measured.
        memory_failure (str or None): why the memory could not be measured.
    """

    implementation: str
    memory_format: str
    backend: str | None = None
    seconds: list[float] = field(default_factory=list)
    failure: str | None = None
    memory: PeakMemory | None = None
    memory_failure: str | None = None

    @property
    def time(self) -> Spread | None:
        return spread(self.seconds) if self.seconds else None


@dataclass
class Comparison:
    """The rows of one case.

    Attributes:
        suite (str): what it belongs to.
        title (str): the case in words.
        mode (str): "forward", "forward+backward", "inference" or "training step".
        case (dict): the case as data.
        baseline (str): the implementation that the ratios refer to.
        ours (str or None): a second one that they refer to.
        rows (list[Row]): in the order of the contestants.
        every_row (bool): whether tables show every row, or each implementation's fastest only.
    """

    suite: str
    title: str
    mode: str
    case: dict[str, Any]
    baseline: str
    ours: str | None = None
    rows: list[Row] = field(default_factory=list)
    every_row: bool = False

    def best(self, implementation: str) -> Row | None:
        """The row of its faster memory format; None where it did not run."""
        rows = [row for row in self.rows if row.implementation == implementation and row.seconds]
        return min(rows, key=lambda row: spread(row.seconds).median, default=None)

    def time_ratio(self, row: Row | None, to: str | None = None) -> Spread | None:
        """Its time over that of ``to`` (the baseline) in the same round, over its rounds."""
        reference = self.best(to or self.baseline)
        if row is None or reference is None or not row.seconds:
            return None
        return spread([a / b for a, b in zip(row.seconds, reference.seconds)])

    def memory_ratio(self, row: Row | None) -> float | None:
        """Its peak memory over that of the baseline, in whichever format that takes less."""
        baseline = [row for row in self.rows if row.implementation == self.baseline]
        least = min((row.memory.step for row in baseline if row.memory is not None), default=0)
        return None if row is None or row.memory is None or least <= 0 else row.memory.step / least

    def shown_rows(self) -> list[Row]:
        """What a table shows: for each implementation the best row, or the first that failed."""
        if self.every_row:
            return self.rows
        names = list(dict.fromkeys(row.implementation for row in self.rows))
        return [
            self.best(name) or next(row for row in self.rows if row.implementation == name)
            for name in names
        ]


def run(
    comparison: Comparison, contestants: Sequence[Contestant], rounds: int, device: str
) -> Comparison:
    """Fills in the rows: times first, then the memory of those rows that tables show."""
    builds = {(c.implementation, c.memory_format): c.build for c in contestants}
    seconds, failures = race(builds, rounds, device)
    torch.compiler.reset()
    free_memory(device)
    for c in contestants:
        key = (c.implementation, c.memory_format)
        comparison.rows.append(
            Row(*key, c.backend, seconds.get(key, []), failures.get(key)),
        )
    for row in comparison.shown_rows():
        if row.failure is not None:
            continue
        memory = peak_memory(builds[row.implementation, row.memory_format], device)
        if isinstance(memory, str):
            row.memory_failure = memory
        else:
            row.memory = memory
    return comparison
