"""The processes that load images: they outlive SIGTERM, but not the training; what they raise."""

import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any


class UnusableImageError(ValueError):
    """``str`` of it is one sentence, which names the file.

    From a process of a DataLoader it comes with that one's stack, whose last line is the sentence.
    """

    @classmethod
    def because_of(cls, error: Exception, path: str, record: str = "") -> "UnusableImageError":
        """Pillow alone has half a dozen classes for a broken file."""
        reason = " ".join(str(error).split()) or type(error).__name__
        return cls(f"The image {path!r}{record} cannot be used: {reason}")

    def __str__(self) -> str:
        last = super().__str__().strip().rpartition("\n")[2]
        return last.removeprefix(f"{type(self).__module__}.{type(self).__qualname__}: ")


def living_as_long_as_the_training() -> Callable[[int], None]:
    """The ``worker_init_fn`` of a DataLoader in a training that saves after SIGTERM."""
    is_ending = multiprocessing.Event()
    # Before the workers are told to end, which the module does when its process exits.
    multiprocessing.util.Finalize(None, is_ending.set, exitpriority=100)
    return functools.partial(_live_as_long_as_the_training, is_ending)


def _live_as_long_as_the_training(is_ending: Event, worker: int) -> None:
    """Ignores the SIGTERM that schedulers send to all processes: the last step needs its images.

    But leaves when the training is killed. torch sees that only where the training is the parent,
    not where a fork server is, which Python 3.14 takes by default.
    """

    def leave_if_ending(*signal_and_frame: Any) -> None:
        if is_ending.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_ending)
    threading.Thread(
        target=_leave_after, args=[multiprocessing.parent_process()], daemon=True
    ).start()


def _leave_after(training: Any) -> None:
    training.join()
    os._exit(1)
