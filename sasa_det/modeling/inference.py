"""What makes a trained detector faster, and no different."""

import copy
from typing import Any, TypeVar

import torch
from detectron2.layers import Conv2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .blocks import AttentionBottleneckBlock
from .norm import is_batch_norm

Model = TypeVar("Model", bound=nn.Module)


def fold_batch_norm(model: Model) -> Model:
    """A copy for inference, its batch norms folded into the weights before them.

    That is detectron2's convolutions with their norm, in any of its models, and the norm behind the
    attention of a bottleneck: the weights of a softmax sum to one, so what scales and shifts the
    values scales and shifts the output; a residual is then scaled as it is added. The attention
    stem needs no folding.

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
        elif isinstance(module, AttentionBottleneckBlock) and is_batch_norm(module.attention_norm):
            _fold_into_values(module)
    return model


def _fold_into_values(block: AttentionBottleneckBlock) -> None:
    norm: Any = block.attention_norm
    projection = block.attention.projection
    channels = block.attention.out_channels
    value, value_bias = _fold(projection.weight[-channels:], None, norm)
    projection.weight[-channels:] = value
    bias = torch.cat([value_bias.new_zeros(2 * channels), value_bias])
    projection.bias = nn.Parameter(bias, requires_grad=False)
    if block.residual:
        scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
        block.residual_scale = scale.detach().view(1, -1, 1, 1)
    block.attention_norm = nn.Identity()


@torch.no_grad()
def _fold(weight: torch.Tensor, bias: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    folded = fuse_conv_bn_weights(
        weight, bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return tuple(x.requires_grad_(False) for x in folded)  # type: ignore[return-value]
