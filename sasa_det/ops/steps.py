"""What the operators are made of: where no kernel computes all of one at once, and for autograd."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import choose
from .calls import LARGE_BLOCK, AttentionCall, ProjectedCall, ResidualCall, memory_format
from .checks import check_scale_and_shift
from .operator import without_autocast


def projected_attention(call: ProjectedCall) -> tuple[Tensor, Tensor]:
    """As the operator, in the memory format of its input: a convolution, and attention."""
    results = []
    for part in _parts(call):
        attention = _attention(part)
        results.append(choose("local_attention", attention).forward(attention))
    output, logsumexp = (concatenated(maps, dim=1) for maps in zip(*results))
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
    parts = _parts(call)
    needed = (input_gradient, weight_gradient, weight_gradient and call.bias is not None)
    of_parts = []
    maps = zip(*(x.chunk(len(parts), dim=1) for x in (grad_output, logsumexp)))
    for part, (grad, lse) in zip(parts, maps):
        attention = _attention(part)
        grad_maps, *of_embeddings = choose("local_attention", attention).backward(
            attention, grad, None, lse.contiguous()
        )
        of_projection = projection_gradients(grad_maps, part.x, part.weight, needed)
        of_parts.append((*of_projection, *of_embeddings))
    of_input, of_weight, of_bias, *of_embeddings = zip(*of_parts)
    grads = []
    if input_gradient:
        grads.append(sum(of_input).contiguous(memory_format=memory_format(call.x)))
    for of_rows in (of_weight, of_bias):
        if of_rows[0] is not None:
            by_map = [x.unflatten(0, (3, -1)) for x in of_rows]
            grads.append(concatenated(by_map, dim=1).flatten(0, 1).contiguous())
    return [*grads, *(concatenated(x, dim=0) for x in of_embeddings)]


def _parts(call: ProjectedCall) -> list[ProjectedCall]:
    """The call by groups of heads, without what comes behind the attention."""
    groups = groups_of_heads(call.x, call.weight, call.num_heads)
    rest: tuple[Any, ...] = (None, None, None, call.num_heads // groups, call.kernel_size)
    return [ProjectedCall(*part, *rest) for part in split_heads(call[:5], groups)]


def _attention(call: ProjectedCall) -> AttentionCall:
    query, key, value = project(call.x, call.weight, call.bias).chunk(3, dim=1)
    embeddings = (call.rel_rows, call.rel_cols)
    return AttentionCall(query, key, value, *embeddings, call.num_heads, call.kernel_size)


def concatenated(parts: Sequence[Tensor], *, dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def split_heads(tensors: tuple[Any, ...], groups: int) -> Iterator[tuple[Any, ...]]:
    """x, weight, bias and the two embeddings of each group of heads."""
    if groups == 1:
        yield tensors
        return
    x, weight, bias, *embeddings = tensors
    rows = torch.arange(weight.shape[0], device=weight.device).view(3, groups, -1)
    for group in range(groups):
        of_group = rows[:, group].flatten()
        group_bias = None if bias is None else bias[of_group]
        group_embeddings = (None if e is None else e.chunk(groups)[group] for e in embeddings)
        yield x, weight[of_group], group_bias, *group_embeddings


def groups_of_heads(x: Tensor, weight: Tensor, num_heads: int) -> int:
    """How many groups of heads are computed one after another, for the sake of memory."""
    channels = weight.shape[0]
    if x.device.type != "cpu" or channels % (3 * max(num_heads, 1)):
        return 1
    size = x.shape[0] * channels * x.shape[2] * x.shape[3] * x.element_size()
    divisors = [groups for groups in range(1, num_heads + 1) if num_heads % groups == 0]
    return next((g for g in divisors if size <= g * LARGE_BLOCK), num_heads)


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
