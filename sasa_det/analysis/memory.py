"""Peak memory of one step of a contestant.

On the CPU it is the resident memory of a process of its own. The process builds model and input,
runs the warm-up, and takes its resident memory there as zero. On CUDA it is what torch's allocator
handed out.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import re
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from .timing import Build, free_memory, reason

STATUS = Path("/proc/self/status")
CGROUP = Path("/sys/fs/cgroup")
LONGEST_WAIT = 1800  # seconds
# A second step meets what the first one left, such as an optimiser's state.
STEPS = 2


class PeakMemory(NamedTuple):
    """Bytes.

    Attributes:
        step (int): the peak during a step, above what held the model and all that it is given.
        total (int): the peak of the whole process on the CPU; on CUDA that of the contestant's
            model, input and step together.
    """

    step: int
    total: int


def peak_memory(build: Build, device: str) -> PeakMemory | str:
    """The peak memory of the contestant that ``build`` builds, or why it was not measured.

    Args:
        build: must be picklable, for a process of its own on the CPU.
        device (str): "cpu" or "cuda".
    """
    if device == "cuda":
        return _peak_on_cuda(build)
    # Processes forked from a small one that has imported all: they start at once, and alike.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sasa_det.analysis.detector_workloads"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_in_process, args=(build, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(LONGEST_WAIT):
            return f"not measured: it took longer than {LONGEST_WAIT} s"
        return receiver.recv()
    except EOFError:
        process.join()
        return f"not measured: its process ended with exit code {process.exitcode}"
    finally:
        process.join(timeout=10)
        process.kill()


def limit_memory() -> None:
    """Lets an allocation beyond the free memory fail, instead of the machine running out of it."""
    free = _free_memory()
    if free is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = _status("VmData") + int(0.9 * free)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _measure_in_process(build: Build, sender: Connection) -> None:
    result: PeakMemory | str
    try:
        limit_memory()
        _return_blocks_when_freed()
        steps = build()
        steps.warm_up()
        gc.collect()
        _return_freed_memory()
        _reset_peak()
        start = _peak_resident()
        for _ in range(STEPS):
            steps.step()
        peak = _peak_resident()
        result = PeakMemory(peak - start, peak)
    except Exception as error:
        result = reason(error)
    sender.send(result)


def _peak_on_cuda(build: Build) -> PeakMemory | str:
    free_memory("cuda")
    others = torch.cuda.memory_allocated()
    try:
        steps = build()
        steps.warm_up()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        for _ in range(STEPS):
            steps.step()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    except Exception as error:
        return reason(error)
    return PeakMemory(peak - start, peak - others)


def _peak_resident() -> int:
    """The largest resident memory so far, or since the last reset, in bytes."""
    if STATUS.exists():
        return _status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _reset_peak() -> None:
    """Linux lets a process forget its peak; elsewhere the peak of building remains in it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _return_blocks_when_freed() -> None:
    """Has the C library map large blocks one by one, so that what is resident is what is in use.

    By itself it keeps some of what was freed, how much depends on the order of sizes.
    """
    mmap_threshold, size = -3, 64 * 1024  # M_MMAP_THRESHOLD of malloc.h; bytes
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).mallopt(mmap_threshold, size)


def _return_freed_memory() -> None:
    """Has the C library give freed memory back, so that a step cannot hide in it."""
    with contextlib.suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def _free_memory() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    free = _field("MemAvailable", text)
    try:  # a container's limit
        maximum, current = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current"))
        return min(free, int(maximum) - int(current))
    except (OSError, ValueError):
        return free


def _status(field: str) -> int:
    return _field(field, STATUS.read_text())


def _field(name: str, text: str) -> int:
    """Bytes, of a field that /proc gives in kB."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise RuntimeError(f"The system does not report {name}.")
    return 1024 * int(match[1])
