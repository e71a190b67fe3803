"""The processes that load images: they outlive SIGTERM, but not the training; what they raise."""

import functools
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
from multiprocessing.synchronize import Event
from typing import Any

from torch.utils.data import DataLoader


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


class TrainingDataLoader(DataLoader):
    """A DataLoader in a training that saves after SIGTERM: its processes are there until then."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        is_ending = multiprocessing.Event()
        # Before the workers are told to end, which the module does when its process exits.
        multiprocessing.util.Finalize(None, is_ending.set, exitpriority=100)
        self.worker_init_fn = functools.partial(_live_as_long_as_the_training, is_ending)

    @classmethod
    def like(cls, loader: DataLoader) -> "TrainingDataLoader":
        """With the batches of one that detectron2 has built."""
        return cls(
            loader.dataset,
            batch_sampler=loader.batch_sampler,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )

    def __iter__(self) -> Any:
        # A fork server would keep SIGTERM blocked, and have it so in all that others start by it:
        # there a worker that is told to end as it starts still does, and the training with it.
        if multiprocessing.get_start_method() == "forkserver":
            return super().__iter__()
        # Workers start with the signals blocked that are blocked here, so SIGTERM waits until they
        # ignore it. What is sent to the training another thread takes, or this one afterwards.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _live_as_long_as_the_training(is_ending: Event, worker: int) -> None:
    """Ignores the SIGTERM that schedulers send to all processes: the last step needs its images.

    But leaves when the training is killed. torch sees that only where the training is the parent,
    not where a fork server is, which Python 3.14 takes by default.
    """

    def leave_if_ending(*signal_and_frame: Any) -> None:
        if is_ending.is_set():
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_ending)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(
        target=_leave_after, args=[multiprocessing.parent_process()], daemon=True
    ).start()


def _leave_after(training: Any) -> None:
    training.join()
    os._exit(1)
