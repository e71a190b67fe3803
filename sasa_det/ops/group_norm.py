"""What stands in front of each attention of a head: group norm and ReLU."""

from typing import Any

import torch
from torch import Tensor

from .backends import find
from .calls import GroupNormCall
from .operator import makes_a_program
from .registration import group_norm_relu_backward_op, group_norm_relu_op


def group_norm_relu(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor | None:
    """relu(group_norm(x)), where a kernel does both: on CUDA, for maps whose channels are last.

    It does without copies in another format, computes in float32 whatever ``x`` is, and keeps for
    the backward no more than ``x`` and the statistics.

    Args:
        x (Tensor[N, C, H, W]): what is normalised.
        num_groups, weight, bias, eps: as in ``torch.nn.functional.group_norm``.

    Returns:
        Tensor or None: in the dtype of ``x``, under autocast too; None if no kernel serves the
        call.
    """
    call = served_call(x, num_groups, weight, bias, eps)
    if call is None:
        return None
    return _GroupNormReLU.apply(*call) if torch.is_grad_enabled() else group_norm_relu_op(*call)[0]


def served_call(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> GroupNormCall | None:
    """What the operator is to be called with; None if no kernel serves it."""
    if weight is None or bias is None or x.dim() != 4 or makes_a_program():
        return None
    call = GroupNormCall(x, weight, bias, None, num_groups, eps)
    return None if find("group_norm_relu", call) is None else call


def gradients(grad_output: Tensor, call: GroupNormCall) -> tuple[Tensor, Tensor, Tensor]:
    """Of x, weight and bias; the call has the statistics of the forward."""
    grad_input, grads = group_norm_relu_backward_op(grad_output, *call)
    return grad_input, grads[0].to(call.weight.dtype), grads[1].to(call.bias.dtype)


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call = GroupNormCall(*arguments)
        output, statistics = group_norm_relu_op(*call)
        ctx.save_for_backward(call.x, call.weight, call.bias, statistics)
        ctx.options = (call.num_groups, call.eps)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call = GroupNormCall(*ctx.saved_tensors, *ctx.options)
        return *gradients(grad_output, call), None, None, None
