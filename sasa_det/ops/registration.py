"""The torch operators: schema, fake implementation, autograd and FLOP formula of each.

Autograd, ``torch.compile``, ``torch.export`` and FLOP counters see one node a call,
``sasa_det::local_attention``, ``::stem_attention`` or ``::stem_attention_pooled``, whatever backend
computes it. Where a backend projects queries, keys and values as well, ``::projected_attention``
stands for the convolution and ``::local_attention``; so it does in float32 on the CPU where it is
compiled, and finds out at each call.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import flops, steps
from .backends import choose, find
from .calls import (
    AttentionCall,
    ProjectedCall,
    ResidualCall,
    StemCall,
    compute_dtype,
    empty_gradient,
    empty_map,
    empty_pooled,
    memory_format,
)
from .checks import check_attention, check_projected_attention
from .operator import operator

# The arguments of the calls, as AttentionCall and StemCall have them.
_ATTENTION = (
    "Tensor query, Tensor key, Tensor value, Tensor? rel_rows, Tensor? rel_cols, "
    "int num_heads, int kernel_size"
)
_PROJECTED = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? rel_rows, Tensor? rel_cols, "
    "Tensor? residual, Tensor? output_scale, Tensor? output_shift, int num_heads, int kernel_size"
)
_STEM = (
    "Tensor image, Tensor query_weight, Tensor key_weight, Tensor value_weights, Tensor mixture, "
    "Tensor? rel_rows, Tensor? rel_cols, int num_heads"
)


@operator(f"local_attention({_ATTENTION}) -> (Tensor, Tensor)")
def local_attention_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The output, and (N, heads, H, W) log-sum-exp of the logits in the compute dtype."""
    call = AttentionCall(*arguments)
    check_attention(call)  # here, because compiled backends trust it
    return choose("local_attention", call).forward(call)


@operator(
    "local_attention_backward(Tensor grad_output, Tensor? output, Tensor logsumexp, "
    f"{_ATTENTION}) -> Tensor[]"
)
def local_attention_backward_op(
    grad_output: Tensor, output: Tensor | None, logsumexp: Tensor, *arguments: Any
) -> list[Tensor]:
    """Gradients of query, key and value in one tensor, and of the embeddings unless they are None.

    The three are as the output of one projection is, (N, 3 * C, H, W). The output saves backends
    other than the native one some work, where it is given.
    """
    call = AttentionCall(*arguments)
    check_attention(call)
    return choose("local_attention", call).backward(call, grad_output, output, logsumexp)


@operator(f"projected_attention({_PROJECTED}) -> (Tensor, Tensor)")
def projected_attention_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As ``local_attention``; differentiated by :func:`sasa_det.ops.projected_attention`."""
    call = ProjectedCall(*arguments)
    check_projected_attention(call)
    implementation = find("projected_attention", call)
    forward = steps.projected_attention if implementation is None else implementation.forward
    return forward(call)


@operator(
    "projected_attention_backward(Tensor grad_output, Tensor logsumexp, bool input_gradient, "
    f"bool weight_gradient, {_PROJECTED}) -> Tensor[]"
)
def projected_attention_backward_op(
    grad_output: Tensor,
    logsumexp: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
    *arguments: Any,
) -> list[Tensor]:
    """Gradients of x, and of weight and bias, as far as they are asked for, and of the embeddings;
    without those of tensors that are None. Residual, scale and shift are not looked at."""
    call = ProjectedCall(*arguments)
    check_projected_attention(call)
    implementation = find("projected_attention", call)
    options = (grad_output, logsumexp, input_gradient, weight_gradient)
    if implementation is None:
        return steps.projected_attention_backward(call, *options)
    return implementation.backward(call, *options)


@operator("residual_projection(Tensor residual, Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def residual_projection_op(*arguments: Any) -> Tensor:
    """Without a gradient; see :func:`sasa_det.ops.residual_projection`."""
    call = ResidualCall(*arguments)
    implementation = find("residual_projection", call)
    if implementation is not None:
        return implementation.forward(call)
    out = steps.residual_projection(call)
    return out.contiguous(memory_format=memory_format(call.residual))


@operator(f"stem_attention({_STEM}) -> Tensor")
def stem_attention_op(*arguments: Any) -> Tensor:
    call = StemCall(*arguments)
    return choose("stem_attention", call).forward(call)


@operator(f"stem_attention_backward(Tensor grad_output, bool image_gradient, {_STEM}) -> Tensor[]")
def stem_attention_backward_op(
    grad_output: Tensor, image_gradient: bool, *arguments: Any
) -> list[Tensor]:
    """Gradients of the tensors that are not None, the image's first and only if asked for."""
    call = StemCall(*arguments)
    return choose("stem_attention", call).backward(call, grad_output, image_gradient)


@operator(f"stem_attention_pooled({_STEM}) -> (Tensor, Tensor, Tensor)")
def stem_attention_pooled_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = StemCall(*arguments)
    return choose("stem_attention_pooled", call).forward(call)


@operator(
    "stem_attention_pooled_backward(Tensor grad_maximum, Tensor grad_sum, Tensor grad_square_sum, "
    f"{_STEM}) -> Tensor[]"
)
def stem_attention_pooled_backward_op(
    grad_maximum: Tensor, grad_sum: Tensor, grad_square_sum: Tensor, *arguments: Any
) -> list[Tensor]:
    """Gradients of the tensors that are not None, without the image's."""
    call = StemCall(*arguments)
    implementation = choose("stem_attention_pooled", call)
    return implementation.backward(call, grad_maximum, grad_sum, grad_square_sum)


@local_attention_op.register_fake
def _(*arguments):
    call = AttentionCall(*arguments)
    n, _, height, width = call.query.shape
    dtype = compute_dtype(call.query.dtype)
    logsumexp = call.query.new_empty(n, call.num_heads, height, width, dtype=dtype)
    return torch.empty_like(call.query), logsumexp


@local_attention_backward_op.register_fake
def _(grad_output, output, logsumexp, *arguments):
    call = AttentionCall(*arguments)
    return [empty_gradient(call), *_contiguous_gradients(arguments[3:5])]


@projected_attention_op.register_fake
def _(*arguments):
    call = ProjectedCall(*arguments)
    n, _, height, width = call.x.shape
    output = empty_map(call.x, call.weight.shape[0] // 3)
    dtype = compute_dtype(output.dtype)
    return output, output.new_empty(n, call.num_heads, height, width, dtype=dtype)


@projected_attention_backward_op.register_fake
def _(grad_output, logsumexp, input_gradient, weight_gradient, *arguments):
    call = ProjectedCall(*arguments)
    grads = [empty_map(call.x, call.x.shape[1])] if input_gradient else []
    weights = (call.weight, call.bias) if weight_gradient else ()
    return grads + _contiguous_gradients((*weights, call.rel_rows, call.rel_cols))


@residual_projection_op.register_fake
def _(residual, x, weight, bias):
    return empty_map(residual, residual.shape[1])


@stem_attention_op.register_fake
def _(*arguments):
    call = StemCall(*arguments)
    n, _, height, width = call.image.shape
    return call.image.new_empty(n, call.query_weight.shape[0], height, width)


@stem_attention_backward_op.register_fake
def _(grad_output, image_gradient, *arguments):
    return _contiguous_gradients(arguments[0 if image_gradient else 1 : 7])


@stem_attention_pooled_op.register_fake
def _(*arguments):
    call = StemCall(*arguments)
    maximum = empty_pooled(call)
    total = call.image.new_empty(maximum.shape[1], dtype=compute_dtype(call.image.dtype))
    return maximum, total, torch.empty_like(total)


@stem_attention_pooled_backward_op.register_fake
def _(grad_maximum, grad_sum, grad_square_sum, *arguments):
    return _contiguous_gradients(arguments[1:7])


def _contiguous_gradients(tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors if x is not None]


def _local_attention_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.num_heads, ctx.kernel_size = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _local_attention_backward(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple:
    output, logsumexp, *tensors = ctx.saved_tensors
    grads = local_attention_backward_op(
        grad_output, output, logsumexp, *tensors, ctx.num_heads, ctx.kernel_size
    )
    maps = grads[0].chunk(3, dim=1)
    return *align([*maps, *grads[1:]], tensors), None, None


def _stem_setup(ctx: Any, inputs: tuple, output: Any) -> None:
    *tensors, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


def _stem_attention_backward(ctx: Any, grad_output: Tensor) -> tuple:
    image, *parameters = ctx.saved_tensors
    image_gradient = ctx.needs_input_grad[0]
    grads = stem_attention_backward_op(
        grad_output, image_gradient, image, *parameters, ctx.num_heads
    )
    return *align(grads, [image if image_gradient else None, *parameters]), None


def _stem_attention_pooled_backward(ctx: Any, *grads_of_outputs: Tensor) -> tuple:
    image, *parameters = ctx.saved_tensors
    grads = stem_attention_pooled_backward_op(*grads_of_outputs, image, *parameters, ctx.num_heads)
    return None, *align(grads, parameters), None


def align(grads: list[Tensor], inputs: list[Tensor | None]) -> list[Tensor | None]:
    """Puts None where an input is None."""
    remaining = iter(grads)
    return [None if x is None else next(remaining) for x in inputs]


local_attention_op.register_autograd(
    _local_attention_backward, setup_context=_local_attention_setup
)
stem_attention_op.register_autograd(_stem_attention_backward, setup_context=_stem_setup)
stem_attention_pooled_op.register_autograd(
    _stem_attention_pooled_backward, setup_context=_stem_setup
)


# torch's FlopCounterMode passes the shapes of tensors where the operator has tensors.
@register_flop_formula(torch.ops.sasa_det.local_attention)
def _(*arguments, out_shape=None) -> int:
    query, *_, kernel_size = arguments
    return flops.local_attention_flops(query, kernel_size, relative=arguments[3] is not None)


@register_flop_formula(torch.ops.sasa_det.local_attention_backward)
def _(grad_output, output, logsumexp, *arguments, out_shape=None) -> int:
    query, *_, kernel_size = arguments
    relative = arguments[3] is not None
    return flops.local_attention_backward_flops(query, kernel_size, relative=relative)


@register_flop_formula(torch.ops.sasa_det.projected_attention)
def _(x, weight, *arguments, out_shape=None) -> int:
    _bias, rel_rows, *_, kernel_size = arguments
    relative = rel_rows is not None
    attention = flops.local_attention_flops(out_shape[0], kernel_size, relative=relative)
    return flops.projection_flops(x, weight) + attention


@register_flop_formula(torch.ops.sasa_det.projected_attention_backward)
def _(grad_output, logsumexp, *arguments, out_shape=None) -> int:
    """The projection anew, and a product each for the gradients of x and of the weight."""
    input_gradient, weight_gradient, x, weight, _bias, rel_rows, *_, kernel_size = arguments
    relative = rel_rows is not None
    attention = flops.local_attention_backward_flops(grad_output, kernel_size, relative=relative)
    products = 1 + input_gradient + weight_gradient
    return products * flops.projection_flops(x, weight) + attention


@register_flop_formula(torch.ops.sasa_det.residual_projection)
def _(residual, x, weight, bias, out_shape=None) -> int:
    return flops.projection_flops(x, weight)


def _stem_flops(*arguments, out_shape=None) -> int:
    image, query_weight, _, _, mixture, rel_rows, *_ = arguments
    return flops.stem_attention_flops(image, query_weight, mixture, relative=rel_rows is not None)


def _stem_backward_flops(*arguments, out_shape=None) -> int:
    """The forward anew, and two products for each of its own."""
    return 3 * _stem_flops(*arguments[-len(StemCall._fields) :])


for _forward, _backward in (
    (torch.ops.sasa_det.stem_attention, torch.ops.sasa_det.stem_attention_backward),
    (torch.ops.sasa_det.stem_attention_pooled, torch.ops.sasa_det.stem_attention_pooled_backward),
):
    register_flop_formula(_forward)(_stem_flops)
    register_flop_formula(_backward)(_stem_backward_flops)
