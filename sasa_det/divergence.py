"""Losses and gradients that are not finite: which batch it was, and the way back."""

import math
from collections.abc import Iterable, Sequence
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


def are_finite(tensors: Iterable[Tensor]) -> bool:
    # By their greatest values: a sum of squares overflows earlier than they do.
    return bool(torch.nn.utils.get_total_norm(tensors, norm_type=math.inf).isfinite())


def describe(step: int, losses: dict[str, float], batch: Sequence[dict]) -> dict[str, Any]:
    """``DivergedError.facts`` of the whole batch; all processes must call it with their share."""
    files = [str(image.get("file_name", image.get("image_id"))) for image in batch]
    shares = comm.all_gather((losses, files))
    return {
        "step": step,
        "losses": {name: sum(x[name] for x, _ in shares) / len(shares) for name in losses},
        "files": [name for _, names in shares for name in names],
    }
