"""What stands in front of each attention of a head: group norm and ReLU."""

from typing import Any

import torch
from torch import Tensor

from .backends import allows
from .calls import GroupNormCall, Levels
from .operator import needs_dispatcher, once_differentiable
from .triton import group_norm as kernels


def group_norm_relu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor | None:
    """relu(group_norm(x)), where a kernel does both: on CUDA, for maps whose channels are last.

    It does without copies in another format, computes in float32 whatever ``x`` is, and keeps for
    the backward no more than ``x`` and the statistics.

    Args:
        x (Tensor[N, C, H, W]): what is normalised.
        num_groups, weight, bias, eps: as in ``torch.nn.functional.group_norm``.

    Returns:
        Tensor or None: in the dtype of ``x``, under autocast too; None if no kernel serves the
        call, or if somebody wants to see operators.
    """
    call = served_call(x, num_groups, weight, bias, eps)
    if call is None:
        return None
    return _GroupNormReLU.apply(*call) if torch.is_grad_enabled() else kernels.forward(call)[0]


def served_call(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    levels: Levels | None = None,
) -> GroupNormCall | None:
    """What the kernels are to be called with; None if they do not serve it."""
    if weight is None or bias is None or x.dim() != 4 or x.shape[1] % num_groups:
        return None
    if not allows("triton") or needs_dispatcher((x, weight, bias)):
        return None
    call = GroupNormCall(x, weight, bias, None, num_groups, eps, levels)
    return call if kernels.refuses(call) is None else None


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = GroupNormCall(*arguments)
        output, statistics = kernels.forward(call)
        ctx.save_for_backward(call.x, call.weight, call.bias, statistics)
        ctx.options = call[4:]
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        # A hook on what is kept may have lost the format.
        x = x.contiguous(memory_format=torch.channels_last)
        call = GroupNormCall(x, *others, *ctx.options)
        grad_input, grads = kernels.backward(call, grad_output)
        of_weight, of_bias = grads.to(call.weight.dtype).unbind()
        return grad_input, of_weight, of_bias, None, None, None, None
