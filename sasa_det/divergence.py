"""Losses and gradients that are not finite: which batch it was, and the way back."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor, nn


class DivergedError(FloatingPointError):
    """A loss or a gradient is not finite; the message is for the user.

    Attributes:
        facts (dict): ``step``, the ``losses`` by name and the ``files`` of the batch.
    """

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


class ForwardState:
    """What a training step changes of a detector before the optimiser's turn, to put it back.

    The buffers, such as batch norm's statistics, and RetinaNet's moving average, which is none.
    """

    def __init__(self, detector: nn.Module) -> None:
        self._detector = detector
        self._buffers = [(buffer, buffer.clone()) for buffer in detector.buffers()]
        self._normalizer = getattr(detector, "loss_normalizer", None)

    def restore(self) -> None:
        for buffer, before in self._buffers:
            buffer.copy_(before)
        if self._normalizer is not None:
            self._detector.loss_normalizer = self._normalizer


def give_errors_as_losses(detector: nn.Module) -> None:
    """Has a detector in training return a loss that is not finite, where it would raise that.

    detectron2's region proposal network raises FloatingPointError, in the one process whose images
    it met; the others would wait for its gradients.
    """
    # As a method, but one that can be pickled; copies of the detector get it as theirs.
    detector.forward = partial(_forward, detector)


def _forward(detector: Any, batch: Any) -> Any:
    try:
        return type(detector).forward(detector, batch)
    except FloatingPointError:
        if not detector.training:
            raise
        # Of all parameters: DistributedDataParallel expects a gradient of each.
        learned = [x.sum() for x in detector.parameters() if x.requires_grad]
        return {"proposals": torch.stack(learned).sum() * math.nan}


def are_finite(tensors: Iterable[Tensor]) -> bool:
    # By their greatest values: a sum of squares overflows earlier than they do.
    return bool(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite())


def describe(step: int, losses: dict[str, float], batch: Sequence[dict]) -> dict[str, Any]:
    """``DivergedError.facts`` of the whole batch; all processes must call it with their share."""
    files = [str(image.get("file_name", image.get("image_id"))) for image in batch]
    shares = comm.all_gather((losses, files))
    # Where one of them raised instead, it has other losses than the others.
    names = dict.fromkeys(name for x, _ in shares for name in x)
    return {
        "step": step,
        "losses": {name: _mean([x[name] for x, _ in shares if name in x]) for name in names},
        "files": [name for _, names in shares for name in names],
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
