"""The torch operators: schema, fake implementation, autograd and FLOP formula of each.

Autograd, ``torch.compile``, ``torch.export`` and FLOP counters see one node a call,
``sasa_det::local_attention`` or ``sasa_det::stem_attention``, whatever computes it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import eager, eager_stem, flops

local_attention_op = torch.library.custom_op(
    "sasa_det::local_attention", eager.local_attention_forward, mutates_args=()
)
local_attention_backward_op = torch.library.custom_op(
    "sasa_det::local_attention_backward", eager.local_attention_backward, mutates_args=()
)
stem_attention_op = torch.library.custom_op(
    "sasa_det::stem_attention", eager_stem.stem_attention_forward, mutates_args=()
)
stem_attention_backward_op = torch.library.custom_op(
    "sasa_det::stem_attention_backward", eager_stem.stem_attention_backward, mutates_args=()
)


@local_attention_op.register_fake
def _(query, key, value, rel_rows, rel_cols, num_heads, kernel_size):
    n, _, height, width = query.shape
    logsumexp = query.new_empty(n, num_heads, height, width, dtype=eager.compute_dtype(query.dtype))
    return torch.empty_like(query), logsumexp


@local_attention_backward_op.register_fake
def _(grad_output, query, key, value, rel_rows, rel_cols, output, logsumexp, heads, kernel_size):
    return _gradients_like(query, key, value, rel_rows, rel_cols)


@stem_attention_op.register_fake
def _(image, query_weight, key_weight, value_weights, mixture, rel_rows, rel_cols, num_heads):
    return image.new_empty(image.shape[0], query_weight.shape[0], *image.shape[2:])


@stem_attention_backward_op.register_fake
def _(grad, image, q_weight, k_weight, v_weights, mixture, rows, cols, heads, image_gradient):
    inputs = (image if image_gradient else None, q_weight, k_weight, v_weights, mixture)
    grads = _gradients_like(*inputs, rows, cols)
    return [torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in grads]


def _gradients_like(*inputs: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x) for x in inputs if x is not None]


def _local_attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.num_heads, ctx.kernel_size = inputs
    result, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(*tensors, result, logsumexp)


def _local_attention_backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple:
    saved = ctx.saved_tensors
    grads = local_attention_backward_op(grad_output, *saved, ctx.num_heads, ctx.kernel_size)
    return *_align(grads, saved[:5]), None, None


def _stem_attention_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


def _stem_attention_backward(ctx: Any, grad_output: Tensor) -> tuple:
    image, *parameters = ctx.saved_tensors
    image_gradient = ctx.needs_input_grad[0]
    grads = stem_attention_backward_op(
        grad_output, image, *parameters, ctx.num_heads, image_gradient
    )
    return *_align(grads, (image if image_gradient else None, *parameters)), None


def _align(grads: list[Tensor], inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Puts None where an input is None."""
    remaining = iter(grads)
    return [None if x is None else next(remaining) for x in inputs]


local_attention_op.register_autograd(
    _local_attention_backward, setup_context=_local_attention_setup
)
stem_attention_op.register_autograd(_stem_attention_backward, setup_context=_stem_attention_setup)


# torch's FlopCounterMode passes the shapes of tensors where the operator has tensors.
@register_flop_formula(torch.ops.sasa_det.local_attention)
def _(query, key, value, rel_rows, rel_cols, num_heads, kernel_size, *, out_shape=None) -> int:
    return flops.local_attention_flops(query, kernel_size, relative=rel_rows is not None)


@register_flop_formula(torch.ops.sasa_det.local_attention_backward)
def _(grad, query, key, value, rel_rows, *args, out_shape=None) -> int:
    return flops.local_attention_backward_flops(query, args[-1], relative=rel_rows is not None)


@register_flop_formula(torch.ops.sasa_det.stem_attention)
def _(image, query_weight, key, values, mixture, rel_rows, rel_cols, heads, *, out_shape=None):
    return flops.stem_attention_flops(image, query_weight, mixture, relative=rel_rows is not None)


@register_flop_formula(torch.ops.sasa_det.stem_attention_backward)
def _(grad, image, query_weight, key, values, mixture, rel_rows, *args, out_shape=None) -> int:
    return flops.stem_attention_backward_flops(
        image, query_weight, mixture, relative=rel_rows is not None
    )
