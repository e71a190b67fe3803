"""The whole of a head's attention layer as one step of autograd."""

from typing import Any

import torch
from torch import Tensor

from .calls import GroupNormCall
from .functional import cast_embeddings, cast_for_autocast
from .group_norm import gradients, served_call
from .projected import unfused_backward, unfused_forward
from .registration import group_norm_relu_op


def normed_attention(
    x: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
) -> Tensor | None:
    """x + projected_attention(relu(group_norm(x))), where :func:`group_norm_relu` has a kernel.

    With gradients: what the backward needs of the normed map is computed again, and torch has one
    node to build and to run instead of five.

    Args:
        x (Tensor[N, C, H, W]): what is normalised, and what is added.
        num_groups, norm_weight, norm_bias, eps: as in :func:`group_norm_relu`.
        weight, bias, rel_rows, rel_cols, num_heads, kernel_size: as in
            :func:`projected_attention`, to C channels again.

    Returns:
        Tensor or None: None if no kernel serves the norm.
    """
    call = served_call(x, num_groups, norm_weight, norm_bias, eps)
    if call is None:
        return None
    weight, bias = cast_for_autocast(weight, bias)
    embeddings = cast_embeddings(weight, rel_rows, rel_cols)
    norm = (call.x, call.weight, call.bias, num_groups, eps)
    return _NormedAttention.apply(*norm, weight, bias, *embeddings, num_heads, kernel_size)


class _NormedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, norm_weight, norm_bias, *ctx.norm_options = arguments[:5]
        *tensors, ctx.num_heads, ctx.kernel_size = arguments[5:]
        call = GroupNormCall(x, norm_weight, norm_bias, None, *ctx.norm_options)
        normed, statistics = group_norm_relu_op(*call)
        # Under autocast the map may be wider than the weights.
        normed = normed.to(tensors[0].dtype)
        output, logsumexp = unfused_forward(normed, *tensors, ctx.num_heads, ctx.kernel_size)
        ctx.save_for_backward(x, norm_weight, norm_bias, statistics, *tensors, logsumexp, output)
        return x + output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        call = GroupNormCall(*saved[:4], *ctx.norm_options)
        weight, bias, rel_rows, rel_cols, logsumexp, output = saved[4:]
        normed, _ = group_norm_relu_op(*call)
        grad_normed, *grads = unfused_backward(
            grad_output.to(output.dtype),
            logsumexp,
            output,
            (normed.to(weight.dtype), weight, bias, rel_rows, rel_cols),
            ctx.num_heads,
            ctx.kernel_size,
            [True, *ctx.needs_input_grad[5:7]],
        )
        assert grad_normed is not None
        grad_input, *norm_grads = gradients(grad_normed.to(call.x.dtype), call)
        grad_input += grad_output
        return grad_input, *norm_grads, None, None, *grads, None, None
