"""The projections of an attention layer and its attention, with little kept for the backward."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import AttentionCall
from .checks import check_attention
from .functional import cast_for_autocast, local_attention
from .registration import local_attention_backward_op, local_attention_op


def projected_attention(
    x: Tensor,
    weight: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """:func:`local_attention` of queries, keys and values projected from ``x``.

    Queries, keys and values are three times as large as ``x``. They are not kept for the backward
    but projected anew, so that a layer keeps no more than the convolution that it replaces; this
    costs a ninth of that convolution's FLOPs for each of the three.

    Args:
        x (Tensor[N, C_in, H, W]): as ``query`` of :func:`local_attention`.
        weight (Tensor[3 * C, C_in, 1, 1]): the rows of queries, keys and values, one after another.
        rel_rows, rel_cols, num_heads, kernel_size: as in :func:`local_attention`.

    Returns:
        Tensor[N, C, H, W].
    """
    tensors = cast_for_autocast(x, weight, rel_rows, rel_cols)
    # A trace or an exported program is to show the two operators, not a node that hides them.
    recorded = torch.jit.is_tracing() or torch.compiler.is_exporting()
    if torch.is_grad_enabled() and not recorded:
        return _ProjectedAttention.apply(*tensors, num_heads, kernel_size)
    x, weight, rel_rows, rel_cols = tensors
    query, key, value = F.conv2d(x, weight).chunk(3, dim=1)
    return local_attention(
        query, key, value, rel_rows, rel_cols, num_heads=num_heads, kernel_size=kernel_size
    )


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rel_rows: Tensor | None,
        rel_cols: Tensor | None,
        num_heads: int,
        kernel_size: int,
    ) -> Tensor:
        query, key, value = F.conv2d(x, weight).chunk(3, dim=1)
        call = AttentionCall(query, key, value, rel_rows, rel_cols, num_heads, kernel_size)
        check_attention(call)
        output, logsumexp = local_attention_op(*call)
        # On the CPU the native backward does without the output; eager computes it anew.
        kept_output = output if x.is_cuda else None
        ctx.save_for_backward(x, weight, rel_rows, rel_cols, logsumexp, kept_output)
        ctx.num_heads, ctx.kernel_size = num_heads, kernel_size
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        x, weight, rel_rows, rel_cols, logsumexp, output = ctx.saved_tensors
        # As in the forward, where autocast had been applied to the tensors.
        with torch.autocast(x.device.type, enabled=False):
            maps = F.conv2d(x, weight).chunk(3, dim=1)
        grad_maps, *grads = local_attention_backward_op(
            grad_output,
            output,
            logsumexp,
            *maps,
            rel_rows,
            rel_cols,
            ctx.num_heads,
            ctx.kernel_size,
        )
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_maps,
            x,
            weight,
            None,
            stride=[1, 1],
            padding=[0, 0],
            dilation=[1, 1],
            transposed=False,
            output_padding=[0, 0],
            groups=1,
            output_mask=[*ctx.needs_input_grad[:2], False],
        )
        return grad_x, grad_weight, *(grads or (None, None)), None, None
