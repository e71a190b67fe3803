"""``local_attention`` in plain PyTorch, for every device and dtype.

Beside the inputs only the output and the log-sum-exp of the logits are kept for the backward,
which computes the attention weights anew.
"""

from typing import Any

import torch
from torch import Tensor

from .calls import AttentionCall, compute_dtype, empty_gradient
from .eager_dense import DenseAttention
from .eager_shifted import ShiftedAttention

# Up to here, attention between all positions is faster than the walk over the window (float32, two
# cores, k = 7: forward and backward 5 to 10 times at 8x8, twice at 12x12, slower at 16x16).
_DENSE_POSITIONS = 144


def refuses(call: AttentionCall) -> str | None:
    return call.refusal_of_levels()


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output, logsumexp = _attention(call).forward()
    result = torch.empty_like(call.query)
    return result.copy_(output.flatten(1, 2)), logsumexp


def backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor | None, logsumexp: Tensor
) -> list[Tensor]:
    if output is None:
        output, _ = forward(call)
    grads = _attention(call).backward(
        _by_head(grad_output, call.num_heads), _by_head(output, call.num_heads), logsumexp
    )
    maps = empty_gradient(call)
    for grad, x in zip(grads[:3], maps.chunk(3, dim=1)):
        x.copy_(grad.flatten(1, 2))
    embeddings = [x for x in call[3:5] if x is not None]
    return [maps, *(grad.to(x.dtype) for grad, x in zip(grads[3:], embeddings))]


def weights(call: AttentionCall) -> Tensor:
    """(N, heads, k * k, H, W); zero for the offsets that leave the map."""
    attention = _attention(call, ShiftedAttention)
    n, heads, height, width = call.query.shape[0], call.num_heads, *call.query.shape[2:]
    size = call.kernel_size
    result = attention.query.new_zeros(n, heads, size, size, height, width)
    result[:, :, attention.used_rows, attention.used_cols] = attention.weights()
    return result.flatten(2, 3)


def _attention(call: AttentionCall, implementation: type | None = None) -> Any:
    height, width = call.query.shape[-2:]
    if implementation is None:
        small = height * width <= _DENSE_POSITIONS
        implementation = DenseAttention if small else ShiftedAttention
    return implementation(
        *(_by_head(x, call.num_heads) for x in call[:3]),
        *(x if x is None else x.to(compute_dtype(x.dtype)) for x in call[3:5]),
        call.kernel_size,
    )


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(N, C, H, W) as contiguous (N, heads, head_dim, H, W), in the dtype of computation."""
    n, channels, height, width = x.shape
    x = x.to(compute_dtype(x.dtype)).contiguous()
    return x.view(n, num_heads, channels // num_heads, height, width)
