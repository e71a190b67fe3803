"""Statistics for batch norms that came without."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from sasa_det.modeling.norm import is_batch_norm

from .checkpoints import Source
from .convert import resnet_root
from .images import image_loaders
from .teacher import build_teacher

MEASURED_IMAGES = 64


@torch.no_grad()
def measure_norms(source: Source, cfg: CfgNode, images: list[str], batch_size: int = 4) -> Source:
    """The same ResNet with batch norms that can be trained: mean and variance as measured.

    MSRA's checkpoints hold scale and shift only. In evaluation that is the same; a batch norm that
    trains would take them for what they are not.

    Args:
        source (Source): of which ``has_folded_norms()`` is true.
        cfg (CfgNode): of the model to fill; images are scaled and cut as it says.
        images (list[str]): files; 64 of them are used.
        batch_size (int): images at a time.

    Returns:
        Source: the same function of the image, its pixels those of the config.
    """
    teacher: Any = build_teacher(source, cfg)[0]
    resnet: Any = teacher.get_submodule(resnet_root(teacher).rstrip("."))
    norms = {name: module for name, module in resnet.named_modules() if is_batch_norm(module)}
    training, _ = image_loaders(cfg, images, batch_size)
    batches = itertools.islice(training, -(-MEASURED_IMAGES // batch_size))
    inputs = (teacher.preprocess_image(batch).tensor for batch in batches)
    tensors = dict(source.tensors)
    tensors["stem.conv1.weight"] = resnet.stem.conv1.weight
    for name, measured in with_measured_statistics(norms, resnet, inputs).items():
        tensors |= {f"{name}.{key}": value for key, value in measured.items()}
    return dataclasses.replace(source, tensors=tensors, pixels=None)


@torch.no_grad()
def with_measured_statistics(
    norms: dict[str, nn.Module], model: nn.Module, inputs: Iterable[Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors of batch norms that are the same functions and have these inputs' statistics.

    Args:
        norms (dict[str, nn.Module]): of the model, by any name; they stay as they are.
        model (nn.Module): in evaluation mode.
        inputs (iterable of Tensor): what the model is run on.
    """
    moments: dict[nn.Module, Tensor] = {}

    def look(norm: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].double().transpose(0, 1).flatten(1)
        sums = torch.stack([torch.ones_like(x).sum(1), x.sum(1), x.square().sum(1)])
        moments[norm] = moments[norm] + sums if norm in moments else sums

    handles = [norm.register_forward_pre_hook(look) for norm in norms.values()]
    for x in inputs:
        model(x)
    for handle in handles:
        handle.remove()
    return {name: _measured(norm, moments[norm]) for name, norm in norms.items()}


def _measured(norm: Any, moments: Tensor) -> dict[str, Tensor]:
    """The norm's tensors, for the same function with these statistics."""
    count, total, square_total = moments
    mean = total / count
    variance = (square_total / count - mean.square()).clamp(min=0)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    tensors = {
        "weight": scale * (variance + norm.eps).sqrt(),
        "bias": norm.bias + scale * (mean - norm.running_mean),
        "running_mean": mean,
        "running_var": variance,
    }
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}
