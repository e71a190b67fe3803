"""Activation checkpointing of residual blocks (arXiv 1604.06174)."""

import contextlib
from functools import partial
from typing import Any

import torch
from detectron2.modeling import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class CheckpointedStage(nn.Sequential):
    """Blocks of which training keeps the inputs only; the backward pass computes the rest again.

    Gradients, running statistics and the names of the weights are those without it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not torch.is_grad_enabled():
            return super().forward(x)
        for block in self:
            options: dict[str, Any] = {"context_fn": partial(_contexts, block)}
            # The compiler updates running statistics once by itself, and takes no such contexts.
            if torch.compiler.is_compiling():
                options = {}
            x = checkpoint(block, x, use_reentrant=False, **options)
        return x


def checkpoint_stages(resnet: ResNet) -> ResNet:
    """The network with all its residual blocks checkpointed, in place."""
    for index, name in enumerate(resnet.stage_names):
        stage = CheckpointedStage(*resnet.stages[index])
        setattr(resnet, name, stage)
        resnet.stages[index] = stage
    return resnet


class _Untracked:
    """Within it, the batch norms leave their running statistics alone: they have seen the batch."""

    def __init__(self, block: nn.Module) -> None:
        kinds = nn.modules.batchnorm._BatchNorm
        self.norms = [x for x in block.modules() if isinstance(x, kinds) and x.track_running_stats]
        self.momenta = [norm.momentum for norm in self.norms]

    def __enter__(self) -> None:
        # Not by track_running_stats: the backward pass would miss tensors that it has counted.
        for norm in self.norms:
            norm.momentum = 0.0

    def __exit__(self, *error: object) -> None:
        for norm, momentum in zip(self.norms, self.momenta):
            norm.momentum = momentum
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked -= 1


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, _Untracked]:
    """Around the first computation and around the second."""
    return contextlib.nullcontext(), _Untracked(block)
