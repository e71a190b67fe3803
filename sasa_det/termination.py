"""SIGTERM, by which schedulers announce the end: a training saves before it leaves."""

import logging
import signal
import sys
import threading
from types import FrameType
from typing import Any

from detectron2.checkpoint import Checkpointer
from detectron2.engine import HookBase

from sasa_det.distributed import TERMINATED, any_process


class SaveOnTermination(HookBase):
    """After SIGTERM, ends the step, saves a checkpoint and leaves with exit status 143.

    All processes of a training must have it. It is enough that one of them gets the signal. An
    evaluation is ended first.

    Args:
        checkpointer (Checkpointer): saves what ``--resume`` continues from.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.is_told = False
        self._before: Any = None

    def before_train(self) -> None:
        self.is_told = False
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            self._before = signal.signal(signal.SIGTERM, self._note)

    def after_train(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def after_step(self) -> None:
        step = self.trainer.iter
        is_last = step == self.trainer.max_iter - 1
        if any_process(self.is_told):
            name = "model_final" if is_last else f"model_{step:07d}"
            if not is_last:  # that one is saved already
                self.checkpointer.save(name, iteration=step)
            any_process(True)  # none leaves before it is saved
            logging.getLogger("detectron2").warning(
                "SIGTERM: saved %s.pth after step %d; go on with the same command and --resume.",
                name,
                step,
            )
            if not is_last:
                sys.exit(TERMINATED)
            self.after_train()
            signal.raise_signal(signal.SIGTERM)  # or the evaluation would come first
        elif is_last:
            self.after_train()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.is_told = True
