"""The stem's attention pooled to one position a block, in plain PyTorch."""

import torch
from torch import Tensor

from .calls import StemCall, empty_pooled
from .eager_stem import CHUNK, Blocks


def refuses(call: StemCall) -> None:
    """It serves every call."""


def forward(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    blocks = Blocks(call)
    maxima = []
    total = torch.zeros_like(call.query_weight[:, 0], dtype=blocks.stem.dtype)
    square_total = torch.zeros_like(total)
    for pixels, outside in blocks.chunks():
        output = blocks.stem.forward(pixels, outside)
        maxima.append(_fill_outside(output, outside, float("-inf")).amax(dim=0))
        inside = _fill_outside(output, outside, 0.0)
        total += inside.sum(dim=(0, 1))
        square_total += inside.square().sum(dim=(0, 1))
    maximum = empty_pooled(call)
    by_block = torch.cat(maxima).unflatten(0, (len(maximum), *maximum.shape[2:]))
    maximum.copy_(by_block.permute(0, 3, 1, 2))
    return maximum, total, square_total


def backward(
    call: StemCall, grad_maximum: Tensor, grad_total: Tensor, grad_square_total: Tensor
) -> list[Tensor]:
    blocks = Blocks(call)
    grad_maximum = grad_maximum.to(blocks.stem.dtype).permute(0, 2, 3, 1).flatten(0, 2)
    for (pixels, outside), grad in zip(blocks.chunks(), grad_maximum.split(CHUNK)):
        output = blocks.stem.forward(pixels, outside)
        position = _fill_outside(output, outside, float("-inf")).argmax(dim=0, keepdim=True)
        grad_output = (2 * grad_square_total * output).add_(grad_total)
        grad_output = _fill_outside(grad_output, outside, 0.0)
        grad_output.scatter_add_(0, position, grad.unsqueeze(0))
        blocks.stem.backward(grad_output, pixels, outside)
    return blocks.stem.parameter_gradients()


def _fill_outside(x: Tensor, outside: Tensor | None, value: float) -> Tensor:
    """``x`` (P, T, C) with ``value`` at the positions (P, T) outside the image."""
    return x if outside is None else x.masked_fill(outside.unsqueeze(-1), value)
