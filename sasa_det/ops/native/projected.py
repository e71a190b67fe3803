"""``projected_attention`` on the CPU, in C: no map of queries, keys or values exists."""

import torch
from torch import Tensor

from ..calls import ProjectedCall, empty_logsumexp, empty_map, memory_format
from . import library
from .attention import attention_arguments, number_of_bands, run_backward

_WIDEST = 16  # floats in a vector, as in calls.h


def refuses(call: ProjectedCall) -> str | None:
    """What is refused goes to a convolution and ``local_attention``, wrong arguments as well."""
    x, weight, bias = call[:3]
    for tensor in call[:8]:
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device != x.device):
            return "it projects in float32, on one device"
    fits = bias is None or bias.shape == weight.shape[:1]
    if call.residual is not None:
        fits = fits and call.residual.shape == call.output_shape()
    if not fits or call.kernel_size < 1:
        return "the shapes of the tensors do not fit together, or not with heads and window"
    bands = number_of_bands(x.shape[0] * call.num_heads, x.shape[2], call.kernel_size)
    if bands > 1 and x.shape[2] < 3 * call.kernel_size * bands:
        return "with so few heads and images for its threads it projects many rows twice"
    return library.refuses(x)


def forward(call: ProjectedCall) -> tuple[Tensor, Tensor]:
    output = library.mapped(empty_map(call.x, call.weight.shape[0] // 3))
    logsumexp = empty_logsumexp(output, call.num_heads)
    arguments, _kept = _arguments(call, logsumexp)
    arguments.output = library.Map.of(output)
    if call.residual is not None:
        arguments.residual = library.Map.of(call.residual)
    if call.output_scale is not None and call.output_shift is not None:
        scale, shift = call.output_scale.contiguous(), call.output_shift.contiguous()
        arguments.output_scale, arguments.output_shift = scale.data_ptr(), shift.data_ptr()
    library.run("sasa_det_attention_forward", arguments)
    return output, logsumexp


def backward(
    call: ProjectedCall,
    grad_output: Tensor,
    logsumexp: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
) -> list[Tensor]:
    """Gradients of x, weight and bias, as far as they are asked for, and of the embeddings; without
    those of tensors that are None."""
    arguments, _kept = _arguments(call, logsumexp)
    n, channels, height, width = call.x.shape
    grads: list[Tensor] = []
    if input_gradient:
        # All heads add to it, one after another at each place.
        padded = torch.empty(
            (n, -(-channels // _WIDEST) * _WIDEST, height, width),
            dtype=torch.float32,
            device=call.x.device,
            memory_format=torch.channels_last,
        )
        heads_done = call.x.new_zeros((n, height), dtype=torch.int32)
        arguments.grad_input = library.Map.of(library.mapped(padded))
        arguments.heads_done = heads_done.data_ptr()
        grads.append(padded[:, :channels])
    weights = [t for t in (call.weight, call.bias) if t is not None and weight_gradient]
    # Each image and band adds up its own part, as for the embeddings.
    parts = [t.new_empty((n * arguments.bands, *t.shape)) for t in weights]
    for name, part in zip(("grad_projection", "grad_bias"), parts):
        setattr(arguments, name, part.data_ptr())
    embeddings = run_backward(arguments, call, grad_output)
    grads = [grad.contiguous(memory_format=memory_format(call.x)) for grad in grads]
    return [*grads, *(part.sum(dim=0) for part in parts), *embeddings]


def _arguments(
    call: ProjectedCall, logsumexp: Tensor
) -> tuple[library.AttentionArguments, list[Tensor | None]]:
    """What the library is called with, and what it points to."""
    arguments, kept = attention_arguments(call, call.output_shape(), logsumexp)
    # It reads the channels of a position one after another, and rows without a gap.
    x = call.x
    if x.stride(1) != 1 or x.stride(2) != x.shape[3] * x.stride(3):
        x = x.contiguous(memory_format=torch.channels_last)
    weight = call.weight.flatten(1).contiguous()
    bias = None if call.bias is None else call.bias.contiguous()
    arguments.in_channels = x.shape[1]
    arguments.input = library.Map.of(x)
    arguments.projection = weight.data_ptr()
    arguments.bias = None if bias is None else bias.data_ptr()
    return arguments, [*kept, x, weight, bias]
