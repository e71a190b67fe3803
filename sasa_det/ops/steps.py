"""What the operators are made of: where no kernel computes all of one at once, and for autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose
from .calls import AttentionCall, ProjectedCall, ResidualCall, memory_format
from .checks import check_scale_and_shift
from .operator import without_autocast


def projected_attention(call: ProjectedCall) -> tuple[Tensor, Tensor]:
    """As the operator, in the memory format of its input: a convolution, and attention."""
    attention = _attention(call)
    output, logsumexp = choose("local_attention", attention).forward(attention)
    output = add_and_scale(output, call.residual, call.output_scale, call.output_shift)
    return output.contiguous(memory_format=memory_format(call.x)), logsumexp


def projected_attention_backward(
    call: ProjectedCall,
    grad_output: Tensor,
    logsumexp: Tensor,
    input_gradient: bool,
    weight_gradient: bool,
) -> list[Tensor]:
    """As the operator's: of what is asked for, and is not None."""
    attention = _attention(call)
    grad_maps, *of_embeddings = choose("local_attention", attention).backward(
        attention, grad_output, None, logsumexp
    )
    needed = (input_gradient, weight_gradient, weight_gradient and call.bias is not None)
    grads = projection_gradients(grad_maps, call.x, call.weight, needed)
    formats = (memory_format(call.x), *[torch.contiguous_format] * 2)
    of_projection = (x.contiguous(memory_format=f) for x, f in zip(grads, formats) if x is not None)
    return [*of_projection, *of_embeddings]


def _attention(call: ProjectedCall) -> AttentionCall:
    query, key, value = project(call.x, call.weight, call.bias).chunk(3, dim=1)
    embeddings = (call.rel_rows, call.rel_cols)
    return AttentionCall(query, key, value, *embeddings, call.num_heads, call.kernel_size)


def residual_projection(call: ResidualCall) -> Tensor:
    """A convolution, a sum and ReLU."""
    out = F.conv2d(call.x, call.weight, call.bias)
    out += call.residual
    return F.relu_(out)


@without_autocast
def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Queries, keys and values in one map."""
    if x.is_cuda:  # as the kernels want them; it costs less to copy x than the three
        x = x.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias)


def projection_gradients(
    grad_maps: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, as far as they are needed."""
    return torch.ops.aten.convolution_backward(
        grad_maps,
        x,
        weight,
        weight.shape[:1],  # of the bias
        stride=[1, 1],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=needed,
    )


def add_and_scale(
    output: Tensor, residual: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """What becomes of an output (N, C, H, W) where no kernel does it while it writes."""
    check_scale_and_shift(scale, shift)
    output = output if residual is None else output + residual
    if scale is None or shift is None:
        return output
    return torch.addcmul(shift[:, None, None], output, scale[:, None, None])
