"""What stands in front of each attention of a head: group norm and ReLU."""

from typing import Any

import torch
from torch import Tensor

from .backends import find
from .calls import GroupNormCall
from .functional import makes_a_program
from .registration import group_norm_relu_backward_op, group_norm_relu_op


def group_norm_relu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """relu(group_norm(x)), where a kernel does both: on CUDA, for maps whose channels are last.

    It does without copies in another format, computes in float32 whatever ``x`` is, and keeps for
    the backward no more than ``x`` and the statistics.

    Args:
        x (Tensor[N, C, H, W]): what is normalised.
        num_groups, weight, bias, eps: as in ``torch.nn.functional.group_norm``.
        statistics (Tensor or None): what an earlier call with this ``x`` returned.

    Returns:
        tuple[Tensor, Tensor] or None: the output, in the dtype of ``x`` under autocast too, and the
        statistics; None if no kernel serves the call.
    """
    if weight is None or bias is None or x.dim() != 4 or makes_a_program():
        return None
    call = GroupNormCall(x, weight, bias, statistics, num_groups, eps)
    if find("group_norm_relu", call) is None:
        return None
    return _GroupNormReLU.apply(*call) if torch.is_grad_enabled() else group_norm_relu_op(*call)


class _GroupNormReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        x, weight, bias, _, ctx.num_groups, ctx.eps = arguments
        output, statistics = group_norm_relu_op(*arguments)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # zeros for these statistics
        ctx.save_for_backward(x, weight, bias, statistics)
        return output, statistics

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_input, grads = group_norm_relu_backward_op(
            grad_output, *ctx.saved_tensors, ctx.num_groups, ctx.eps
        )
        weight, bias = ctx.saved_tensors[1:3]
        return grad_input, grads[0].to(weight.dtype), grads[1].to(bias.dtype), None, None, None
