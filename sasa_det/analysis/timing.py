"""Interleaved timing: every contestant runs once a round, so a slow drift meets all of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch

# A shorter sample would measure the clock: quick steps are repeated within one.
SHORTEST_SAMPLE = 20e-3  # seconds
MOST_REPEATS = 100
# Who is this many times slower than the fastest takes part in the first rounds only.
SLOW, SLOW_ROUNDS = 8, 3

Key = TypeVar("Key", bound=Hashable)


class Steps(NamedTuple):
    """What a contestant runs.

    Attributes:
        warm_up: loads what a first run loads, on an input as small as can be.
        step: what is measured.
    """

    warm_up: Callable[[], object]
    step: Callable[[], object]


Build = Callable[[], Steps]


class Spread(NamedTuple):
    """Median, quartiles and extremes of some measurements, in their unit."""

    median: float
    lower_quartile: float
    upper_quartile: float
    lowest: float
    highest: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(*[values[0]] * 5)
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper, min(values), max(values))


def race(
    builds: dict[Key, Build], rounds: int, device: str
) -> tuple[dict[Key, list[float]], dict[Key, str]]:
    """Times the contestants in turn: A B C, A B C, ...

    Args:
        builds: builds each contestant; all of them stay in memory together.
        rounds (int): how often each is timed, after a warm-up.
        device (str): "cpu" or "cuda"; CUDA is timed by its own events.

    Returns:
        The seconds of each round by contestant (of the first ``SLOW_ROUNDS`` for those ``SLOW``
        times slower than the fastest), and why the others could not run.
    """
    steps: dict[Key, Callable[[], object]] = {}
    estimates: dict[Key, float] = {}
    failures: dict[Key, str] = {}
    for key, build in builds.items():
        try:
            steps[key] = build().step
            time_once(steps[key], device)  # compiles, loads, allocates
            estimates[key] = time_once(steps[key], device)
        except Exception as error:  # whatever stops one contestant does not stop the others
            failures[key] = reason(error)
            steps.pop(key, None)
        if key in failures:
            free_memory(device)  # now that the error no longer holds its tensors
    seconds: dict[Key, list[float]] = {key: [] for key in steps}
    for i in range(rounds):
        if i == SLOW_ROUNDS:
            steps = _without_slow(steps, seconds)
        for key in list(steps):
            try:
                repeats = _repeats(estimates[key])
                seconds[key].append(time_once(steps[key], device, repeats))
            except Exception as error:
                failures[key] = reason(error)
                del steps[key], seconds[key]
            if key in failures:
                free_memory(device)
    return seconds, failures


def time_once(step: Callable[[], object], device: str, repeats: int = 1) -> float:
    """Seconds of one step, the mean of ``repeats`` runs in a row."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        seconds = (_time_cuda if device == "cuda" else _time_cpu)(step, repeats)
    finally:
        if collecting:
            gc.enable()
    return seconds / repeats


def reason(error: BaseException) -> str:
    """Why something failed, in the words of the first of a chain of errors."""
    if _is_out_of_memory(error):
        return "out of memory"
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
        if _is_out_of_memory(error):
            return "out of memory"
    lines = str(error).strip().splitlines()
    sentence = lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__
    return sentence if len(sentence) <= 150 else sentence[:147] + "..."


def free_memory(device: str) -> None:
    """Gives back what dropped contestants held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _time_cpu(step: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    return time.perf_counter() - start


def _time_cuda(step: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def _repeats(seconds: float) -> int:
    return min(MOST_REPEATS, max(1, math.ceil(SHORTEST_SAMPLE / max(seconds, 1e-9))))


def _without_slow(
    steps: dict[Key, Callable[[], object]], seconds: dict[Key, list[float]]
) -> dict[Key, Callable[[], object]]:
    medians = {key: statistics.median(seconds[key]) for key in steps}
    limit = SLOW * min(medians.values(), default=0)
    return {key: step for key, step in steps.items() if medians[key] <= limit}


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
