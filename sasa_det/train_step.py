"""One step of a training: in parts, in mixed precision, and only with finite gradients."""

import contextlib
import logging
import time

import torch
from detectron2.engine import SimpleTrainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sasa_det.distributed import any_process
from sasa_det.divergence import (
    DivergedError,
    ForwardState,
    are_finite,
    describe,
    give_errors_as_losses,
)
from sasa_det.modeling import SASARetinaNet


class StepTrainer(SimpleTrainer):
    """detectron2's ``SimpleTrainer`` and ``AMPTrainer`` in one, on any device, part by part.

    The gradients of a process's share of a batch are summed up over equal parts of it, one after
    the other in memory. They are those of the whole, where the loss is a mean over images.

    A batch whose loss or gradients are not finite changes nothing: neither the weights nor the
    moments of the optimiser nor batch norm's statistics.

    Args:
        model, data_loader, optimizer: as in ``SimpleTrainer``.
        num_parts (int): must divide the number of images that a process gets.
        precision (torch.dtype): of autocast; float32 for none. float16 has its losses scaled.
        max_skipped (int): how many batches may be skipped because of what is not finite.
    """

    def __init__(
        self,
        model,
        data_loader,
        optimizer,
        *,
        num_parts: int = 1,
        precision: torch.dtype = torch.float32,
        max_skipped: int = 0,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.num_parts = num_parts
        self.precision = precision
        self.max_skipped = max_skipped
        self.num_skipped = 0
        self.device_type = next(model.parameters()).device.type
        self.grad_scaler = torch.amp.GradScaler(
            self.device_type, enabled=precision == torch.float16
        )
        self._detector = model.module if isinstance(model, DistributedDataParallel) else model
        give_errors_as_losses(self._detector)
        if isinstance(self._detector, SASARetinaNet):
            self._detector.num_parts = num_parts

    def run_step(self) -> None:
        """Raises DivergedError, after all is as it was, if one batch too many is not finite."""
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        self.optimizer.zero_grad()
        before = ForwardState(self._detector)
        losses = self._backward(batch)
        if any_process(not self._is_finite(losses)):
            before.restore()
            self._skip_or_raise(batch, losses)
            return
        self._write_metrics(losses, data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _is_finite(self, losses: dict[str, Tensor]) -> bool:
        if not are_finite(losses.values()):
            return False
        # A scale that is too great makes them infinite; the scaler leaves such a step out itself.
        if self.grad_scaler.is_enabled() and self.grad_scaler.get_scale() > 1:
            return True
        return are_finite(x.grad for x in self.model.parameters() if x.grad is not None)

    def _skip_or_raise(self, batch: list[dict], losses: dict[str, Tensor]) -> None:
        facts = describe(self.iter, {name: float(x) for name, x in losses.items()}, batch)
        shown = ", ".join(f"{name} {loss:.4g}" for name, loss in facts["losses"].items())
        message = (
            f"The loss or its gradient is not finite in step {self.iter} ({shown}), whose batch is "
            + ", ".join(facts["files"])
        )
        if self.num_skipped >= self.max_skipped:
            limit = f"; {self.num_skipped} others were skipped" if self.num_skipped else ""
            raise DivergedError(message + limit, facts)
        self.num_skipped += 1
        logging.getLogger("detectron2").warning(
            "%s; skipped, the %s. of at most %s (SOLVER.MAX_SKIPPED_BATCHES).",
            *(message, self.num_skipped, self.max_skipped),
        )

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
        state = {**super().state_dict(), "num_skipped": self.num_skipped}
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        if hasattr(self._detector, "loss_normalizer"):  # detectron2's RetinaNet has it, too
            state["loss_normalizer"] = self._detector.loss_normalizer
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        if self.grad_scaler.is_enabled() and "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.num_skipped = state_dict.get("num_skipped", 0)
        if "loss_normalizer" in state_dict:
            self._detector.loss_normalizer = state_dict["loss_normalizer"]
