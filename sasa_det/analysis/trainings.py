"""Trainings as processes: a few at once, none of which outlives the one that started them."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .progress import PlannedRun, last_metrics
from .runs import METRICS_FILE

CONSOLE_FILE = "console.txt"  # in the run's folder: what it would have shown
_POLL_SECONDS = 0.2
_PATIENCE_SECONDS = 10


class Training:
    """A run's process. Its output goes to :data:`CONSOLE_FILE` behind what is there.

    Args:
        command: what to execute.
        threads (int): of the CPU, None for as many as torch takes.
        lock (int): a file descriptor to keep open as long as it runs.
    """

    def __init__(
        self, run: PlannedRun, command: Sequence[str], threads: int | None, lock: int
    ) -> None:
        self.run = run
        self.started = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / METRICS_FILE
        self._log_size = log.stat().st_size if log.is_file() else 0
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with (run.folder / CONSOLE_FILE).open("a") as console:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(limits if threads else {})},
                pass_fds=[lock],
                start_new_session=True,  # all its processes get a signal together, and only ours
            )

    @property
    def seconds(self) -> float:
        """Since it started."""
        return time.monotonic() - self.started

    @property
    def metrics(self) -> dict:
        """What it last logged; empty before its first line."""
        return last_metrics(self.run.folder, self._log_size)

    @property
    def steps_done(self) -> int:
        done = self.metrics.get("iteration", self.run.steps_saved() - 1) + 1
        return min(done, self.run.steps)

    def last_words(self) -> str:
        """The last line of its output, the reason where it failed."""
        text = (self.run.folder / CONSOLE_FILE).read_text(errors="replace").strip()
        return text.splitlines()[-1] if text else "it said nothing"

    def terminate(self) -> None:
        """Asks its processes to end."""
        self._signal(signal.SIGTERM)

    def wait(self) -> None:
        """Until they have ended, killed if they take too long."""
        try:
            self.process.wait(timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self.process.wait()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Trainings:
    """Starts runs in their order, ``at_once`` at a time; leaving its context stops what runs.

    ``history`` gets a line of JSON for each process: what it was, how long it took, how it ended.
    """

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        start: Callable[[PlannedRun], Training],
        at_once: int,
        history: Path,
    ) -> None:
        self.waiting = list(runs)
        self.running: list[Training] = []
        self._start = start
        self._at_once = at_once
        self._history = history

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, *exception: object) -> None:
        for training in self.running:
            training.terminate()
        for training in self.running:
            training.wait()
            self._record(training)

    def events(self, period: float) -> Iterator[Training | None]:
        """Each training when it has ended, by itself or not, and None every ``period`` seconds."""
        told = time.monotonic()
        while self.waiting or self.running:
            while self.waiting and len(self.running) < self._at_once:
                self.running.append(self._start(self.waiting.pop(0)))
            time.sleep(_POLL_SECONDS)
            for training in list(self.running):
                if training.process.poll() is not None:
                    self.running.remove(training)
                    self._record(training)
                    yield training
            if time.monotonic() - told >= period:
                told = time.monotonic()
                yield None

    def _record(self, training: Training) -> None:
        run, seconds = training.run, round(training.seconds, 1)
        line = {"row": run.row, "seed": run.seed, "steps": run.steps, "seconds": seconds}
        with self._history.open("a") as file:
            file.write(json.dumps({**line, "exit_code": training.process.returncode}) + "\n")


def recorded_seconds(history: Path) -> float:
    """What all processes took together, those that were stopped or failed too."""
    lines = history.read_text().splitlines() if history.is_file() else []
    return sum(json.loads(line)["seconds"] for line in lines)
