"""What makes a trained detector faster, and no different."""

import copy
from typing import TypeVar

from detectron2.layers import Conv2d
from torch import nn

from .norm import fold, is_batch_norm

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
            folded = fold(module.weight, module.bias, module.norm)
            module.weight, module.bias = (nn.Parameter(x, requires_grad=False) for x in folded)
            module.norm = None
    return model
