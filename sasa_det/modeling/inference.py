"""What makes a trained detector faster, and no different."""

import copy
from typing import Any, TypeVar

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .norm import is_batch_norm

Model = TypeVar("Model", bound=nn.Module)


def fold_batch_norm(model: Model) -> Model:
    """A copy for inference, its batch norms folded into the weights before them.

    That is detectron2's convolutions with their norm, in any of its models. The norms behind
    attention, in the stem and in bottlenecks, stay: the native kernels apply them as they write.

    Args:
        model (nn.Module): stays as it is.

    Returns:
        nn.Module: in evaluation mode, its parameters without gradient.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, Conv2d) and is_batch_norm(module.norm):
            module.weight, module.bias = _fold(module.weight, module.bias, module.norm)
            module.norm = None
    return model


@torch.no_grad()
def _fold(weight: torch.Tensor, bias: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    folded = fuse_conv_bn_weights(
        weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return tuple(x.requires_grad_(False) for x in folded)  # type: ignore[return-value]
