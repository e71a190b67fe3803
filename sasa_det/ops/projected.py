"""The projections of an attention layer and its attention, with little kept for the backward."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import is_one_operator
from .calls import ProjectedCall
from .checks import check_projection
from .functional import cast_embeddings, cast_for_autocast, local_attention
from .operator import shows_steps
from .registration import (
    align,
    local_attention_backward_op,
    local_attention_op,
    projected_attention_backward_op,
    projected_attention_op,
)
from .steps import (
    add_and_scale,
    concatenated,
    groups_of_heads,
    project,
    projection_gradients,
    split_heads,
)


def projected_attention(
    x: Tensor,
    weight: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
) -> Tensor:
    """:func:`local_attention` of queries, keys and values projected from ``x``.

    Queries, keys and values are three times as large as ``x``. They are not kept for the backward
    but projected anew, so that a layer keeps no more than the convolution that it replaces; this
    costs a ninth of that convolution's FLOPs for each of the three. In float32 the native kernels
    project row by row what they need, and use up row by row the gradients of the three: no such map
    exists even for a while.

    Args:
        x (Tensor[N, C_in, H, W]): as ``query`` of :func:`local_attention`.
        weight (Tensor[3 * C, C_in, 1, 1]): the rows of queries, keys and values, one after another.
        rel_rows, rel_cols, num_heads, kernel_size: as in :func:`local_attention`.
        bias (Tensor[3 * C] or None): of the projections; the paper has none.
        residual (Tensor[N, C, H, W] or None): added to the output. The native kernels add it where
            they write, which spares a pass over both.
        output_scale, output_shift (Tensor[C] or None): what the sum is multiplied by and what is
            added to it at last, channel by channel: a batch norm in evaluation. Both or neither.

    Returns:
        Tensor[N, C, H, W].

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    check_projection(x, weight, num_heads)
    x, weight, bias = cast_for_autocast(x, weight, bias)
    tensors = (x, weight, bias, *cast_embeddings(x, rel_rows, rel_cols))
    # Not cast, as a sum under autocast has the wider of two dtypes.
    added = (residual, output_scale, output_shift)
    arguments: tuple[Any, ...] = (*tensors, *added, num_heads, kernel_size)
    if not is_one_operator("projected_attention", ProjectedCall(*arguments)):
        return add_and_scale(_in_two_steps(tensors, num_heads, kernel_size), *added)
    if not torch.is_grad_enabled():
        return projected_attention_op(*arguments)[0]
    # torch's compiler takes no tensor twice, and x often is the residual; it adds by itself.
    within, behind = (None, residual) if torch.compiler.is_compiling() else (residual, None)
    output = _FusedAttention.apply(*tensors, within, num_heads, kernel_size)
    return add_and_scale(output, behind, output_scale, output_shift)


def keeps_output(x: Tensor) -> bool:
    """Whether the backward of attention on the device of ``x`` is to have the output."""
    # On the CPU the native backward does without it; eager computes it anew.
    return x.is_cuda


def _in_two_steps(tensors: tuple[Any, ...], num_heads: int, kernel_size: int) -> Tensor:
    """A convolution, and ``local_attention``."""
    # A trace or an exported program is to show the two operators, not what is made of them here.
    if shows_steps():
        x, weight, bias, rel_rows, rel_cols = tensors
        query, key, value = F.conv2d(x, weight, bias).chunk(3, dim=1)
        return local_attention(
            query, key, value, rel_rows, rel_cols, num_heads=num_heads, kernel_size=kernel_size
        )
    groups = groups_of_heads(tensors[0], tensors[1], num_heads)
    outputs = [
        _unfused(*group, num_heads // groups, kernel_size) for group in split_heads(tensors, groups)
    ]
    return concatenated(outputs, dim=1)


def _unfused(*arguments: Any) -> Tensor:
    if torch.is_grad_enabled():
        return _ProjectedAttention.apply(*arguments)
    return _unfused_forward(*arguments)[0]


def _unfused_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the arguments are the embeddings, num_heads and kernel_size."""
    return local_attention_op(*project(x, weight, bias).chunk(3, dim=1), *arguments)


class _ProjectedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output, logsumexp = _unfused_forward(*arguments)
        *tensors, ctx.num_heads, ctx.kernel_size = arguments
        ctx.save_for_backward(*tensors, logsumexp, output if keeps_output(output) else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        *tensors, logsumexp, output = ctx.saved_tensors
        options = (ctx.num_heads, ctx.kernel_size, ctx.needs_input_grad[:3])
        grads = _unfused_backward(grad_output, logsumexp, output, tuple(tensors), *options)
        return *grads, None, None


class _FusedAttention(torch.autograd.Function):
    """The same by one operator."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, residual, ctx.num_heads, ctx.kernel_size = arguments
        output, logsumexp = projected_attention_op(
            *tensors, residual, None, None, ctx.num_heads, ctx.kernel_size
        )
        ctx.save_for_backward(logsumexp, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        logsumexp, *tensors = ctx.saved_tensors
        arguments: tuple[Any, ...] = (*tensors, None, None, None, ctx.num_heads, ctx.kernel_size)
        of_input, of_weight = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        grads = projected_attention_backward_op(
            grad_output, logsumexp, of_input, of_weight, *arguments
        )
        asked_for = (of_input, of_weight, of_weight, True, True)
        tensors = [t if asked else None for t, asked in zip(tensors, asked_for)]
        grad_residual = grad_output if ctx.needs_input_grad[5] else None
        return *align(grads, tensors), grad_residual, None, None


def _unfused_backward(
    grad_output: Tensor,
    logsumexp: Tensor,
    output: Tensor | None,
    tensors: tuple[Any, ...],
    num_heads: int,
    kernel_size: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of ``tensors``: x, weight and bias, as far as needed, and the embeddings."""
    x, weight, bias, *embeddings = tensors
    maps = project(x, weight, bias).chunk(3, dim=1)
    grad_maps, *grads = local_attention_backward_op(
        grad_output, output, logsumexp, *maps, *embeddings, num_heads, kernel_size
    )
    projection_grads = projection_gradients(grad_maps, x, weight, needed)
    return *projection_grads, *(grads or (None, None))
