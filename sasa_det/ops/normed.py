"""The whole of a head's attention layer as one step, for one map or for all levels of an FPN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import allows
from .calls import AttentionCall, GroupNormCall, Levels
from .checks import check_attention
from .functional import cast_embeddings, cast_for_autocast
from .group_norm import served_call
from .operator import autocast_is_on, somebody_looks
from .projected import project, projection_gradients
from .triton import attention, group_norm, refuses_tensor


class NormedAttention(torch.autograd.Function):
    """x + attention(relu(group_norm(x))), by kernels only.

    What the backward needs of the normed map is computed again, by the same kernels whatever
    backend was asked for in between. torch has one node to build and to run instead of five.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        num_groups: int,
        eps: float,
        levels: Levels | None,
        weight: Tensor,
        bias: Tensor | None,
        rel_rows: Tensor | None,
        rel_cols: Tensor | None,
        num_heads: int,
        kernel_size: int,
    ) -> Tensor:
        norm_call = GroupNormCall(x, norm_weight, norm_bias, None, num_groups, eps, levels)
        normed, statistics = group_norm.forward(norm_call)
        # Under autocast the map may be wider than the weights.
        query, key, value = project(normed.to(weight.dtype), weight, bias)
        call = AttentionCall(query, key, value, rel_rows, rel_cols, num_heads, kernel_size, levels)
        output, logsumexp = attention.forward(call)
        of_norm = (x, norm_weight, norm_bias, statistics)
        ctx.save_for_backward(*of_norm, weight, bias, rel_rows, rel_cols, logsumexp, output)
        ctx.options = (num_groups, eps, levels, num_heads, kernel_size)
        return x + output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, statistics, *saved = ctx.saved_tensors
        weight, bias, rel_rows, rel_cols, logsumexp, output = saved
        num_groups, eps, levels, num_heads, kernel_size = ctx.options
        norm_call = GroupNormCall(x, norm_weight, norm_bias, statistics, num_groups, eps, levels)
        normed = group_norm.forward(norm_call)[0].to(weight.dtype)
        query, key, value = project(normed, weight, bias)
        call = AttentionCall(query, key, value, rel_rows, rel_cols, num_heads, kernel_size, levels)
        grad_maps, *of_embeddings = attention.backward(
            call, grad_output.to(output.dtype), output, logsumexp
        )
        needed = [True, *ctx.needs_input_grad[6:8]]
        grad_normed, *of_projection = projection_gradients(grad_maps, normed, weight, needed)
        assert grad_normed is not None
        grad_input, of_norm = group_norm.backward(norm_call, grad_normed.to(x.dtype))
        grad_input += grad_output
        of_scale, of_shift = of_norm.to(norm_weight.dtype).unbind()
        grads = (grad_input, of_scale, of_shift, None, None, None, *of_projection)
        return *grads, *(of_embeddings or (None, None)), None, None


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
    levels: Levels | None = None,
) -> Tensor | None:
    """x + projected_attention(relu(group_norm(x))), where :func:`group_norm_relu` has a kernel.

    Args:
        x (Tensor[N, C, H, W]): what is normalised, and what is added.
        num_groups, norm_weight, norm_bias, eps: as in :func:`group_norm_relu`.
        weight, bias, rel_rows, rel_cols, num_heads, kernel_size: as in
            :func:`projected_attention`, to C channels again.
        levels (tuple[tuple[int, int], ...] or None): heights and widths of the maps that ``x``
            holds, packed by :func:`pack_levels`; statistics and windows stay within each.

    Returns:
        Tensor or None: None if there are no kernels for it, or if somebody wants to see operators.
    """
    call = served_call(x, num_groups, norm_weight, norm_bias, eps, levels)
    if call is None:
        return None
    weight, bias = cast_for_autocast(weight, bias)
    rel_rows, rel_cols = cast_embeddings(weight, rel_rows, rel_cols)
    # Queries, keys and values will be like x.
    attention_call = AttentionCall(x, x, x, rel_rows, rel_cols, num_heads, kernel_size, levels)
    check_attention(attention_call)  # here, because kernels trust it
    # Only autocast has weights of another dtype; without it torch is to say so.
    mixed = x.dtype != weight.dtype and not autocast_is_on(x.device.type)
    if mixed or attention.refuses(attention_call) is not None:
        return None
    norm = (call.x, call.weight, call.bias, num_groups, eps, levels)
    arguments = (*norm, weight, bias, rel_rows, rel_cols, num_heads, kernel_size)
    return NormedAttention.apply(*arguments)


def can_pack_levels(x: Tensor) -> bool:
    """Whether there are kernels for maps such as ``x``, packed by :func:`pack_levels`."""
    return not somebody_looks((x,)) and allows("triton") and refuses_tensor(x) is None


def pack_levels(maps: Sequence[Tensor]) -> tuple[Tensor, Levels]:
    """Several maps (N, C, H, W) as one (N, C, 1, positions), channels last; and their sizes."""
    packed = torch.cat([x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps], dim=1)
    return packed.mT.unsqueeze(2), tuple((x.shape[2], x.shape[3]) for x in maps)


def unpack_levels(packed: Tensor, levels: Levels) -> list[Tensor]:
    """The maps that :func:`pack_levels` packed, or what became of them; they share memory."""
    maps, start = [], 0
    for height, width in levels:
        # Not split: of what it returns nothing may be changed in place.
        part = packed.squeeze(2).narrow(2, start, height * width)
        maps.append(part.unflatten(2, (height, width)))
        start += height * width
    return maps
