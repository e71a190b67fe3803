"""The processes that load images: they outlive SIGTERM, but not the training."""

import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any


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
