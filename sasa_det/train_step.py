"""One step of a training: in parts, in mixed precision."""

import contextlib
import time

import torch
from detectron2.engine import SimpleTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sasa_det.modeling import SASARetinaNet


class StepTrainer(SimpleTrainer):
    """detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, on any device, part by part.

    The gradients of a process's share of a batch are summed up over equal parts of it, one after
    the other in memory. They are those of the whole, where the loss is a mean over images.

    Args:
        model, data_loader, optimizer: as in ``SimpleTrainer``.
        num_parts (int): must divide the number of images that a process gets.
        precision (torch.dtype): of autocast; float32 for none. float16 has its losses scaled.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        num_parts: int = 1,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.num_parts = num_parts
        self.precision = precision
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=precision == torch.float16
        )
        self._detector = model.module if isinstance(model, DistributedDataParallel) else model
        if isinstance(self._detector, SASARetinaNet):
            self._detector.num_parts = num_parts

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        losses = self._backward(batch)
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _backward(self, batch: list[dict]) -> dict[str, Tensor]:
        """Leaves the gradients in the parameters, and returns the losses of the batch."""
        size = len(batch) // self.num_parts
        losses: dict[str, Tensor] = {}
        for first in range(0, len(batch), size):
            is_last = first + size >= len(batch)
            with contextlib.nullcontext() if is_last else self._unsynchronised():
                of_part = self._forward(batch[first : first + size])
                total = torch.stack(list(of_part.values())).sum()
                self.grad_scaler.scale(total).backward()
            for name, loss in of_part.items():
                losses[name] = losses.get(name, 0) + loss.detach()
        if self.num_parts > 1 and isinstance(self._detector, SASARetinaNet):
            correction = self._detector.end_batch()
            gradients = [x.grad for x in self.model.parameters() if x.grad is not None]
            torch._foreach_mul_(gradients, correction)
            losses = {name: loss * correction for name, loss in losses.items()}
        return losses

    def _forward(self, part: list[dict]) -> dict[str, Tensor]:
        is_mixed = self.precision != torch.float32
        with torch.autocast(self.device_type, dtype=self.precision, enabled=is_mixed):
            return {name: loss / self.num_parts for name, loss in self.model(part).items()}

    def _unsynchronised(self) -> contextlib.AbstractContextManager:
        """The processes exchange gradients once a step."""
        is_distributed = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_distributed else contextlib.nullcontext()

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if isinstance(self._detector, SASARetinaNet):
            state["loss_normalizer"] = self._detector.loss_normalizer
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        if isinstance(self._detector, SASARetinaNet) and "loss_normalizer" in state_dict:
            self._detector.loss_normalizer = state_dict["loss_normalizer"]
