"""``local_attention`` in plain PyTorch, for every device and dtype.

Beside the inputs only the output and the log-sum-exp of the logits are kept for the backward,
which computes the attention weights anew.
"""

import torch
from torch import Tensor

from .eager_dense import DenseAttention
from .eager_shifted import ShiftedAttention

# Up to here, attention between all positions is faster than the walk over the window (float32, two
# cores, k = 7: forward and backward 5 to 10 times at 8x8, twice at 12x12, slower at 16x16).
_DENSE_POSITIONS = 144


def local_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    """The output, and (N, heads, H, W) log-sum-exp of the logits in the dtype of computation."""
    attention = _attention(query, key, value, rel_rows, rel_cols, num_heads, kernel_size)
    output, logsumexp = attention.forward()
    return _like(output, query), logsumexp


def local_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    output: Tensor,
    logsumexp: Tensor,
    num_heads: int,
    kernel_size: int,
) -> list[Tensor]:
    """Gradients of query, key, value and, unless they are None, of the two embeddings."""
    attention = _attention(query, key, value, rel_rows, rel_cols, num_heads, kernel_size)
    grads = attention.backward(
        _by_head(grad_output, num_heads), _by_head(output, num_heads), logsumexp
    )
    maps = [_like(grad, x) for grad, x in zip(grads[:3], (query, key, value))]
    return maps + [grad.to(query.dtype) for grad in grads[3:]]


def local_attention_weights(
    query: Tensor,
    key: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """(N, heads, k * k, H, W); zero for the offsets that leave the map."""
    q, k = _by_head(query, num_heads), _by_head(key, num_heads)
    rows, cols = _to_compute(rel_rows), _to_compute(rel_cols)
    attention = ShiftedAttention(q, k, k, rows, cols, kernel_size)
    n, heads, _, height, width = q.shape
    weights = q.new_zeros(n, heads, kernel_size, kernel_size, height, width)
    weights[:, :, attention.used_rows, attention.used_cols] = attention.weights()
    return weights.flatten(2, 3)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    kernel_size: int,
) -> DenseAttention | ShiftedAttention:
    height, width = query.shape[-2:]
    implementation = DenseAttention if height * width <= _DENSE_POSITIONS else ShiftedAttention
    return implementation(
        _by_head(query, num_heads),
        _by_head(key, num_heads),
        _by_head(value, num_heads),
        _to_compute(rel_rows),
        _to_compute(rel_cols),
        kernel_size,
    )


def _by_head(x: Tensor, num_heads: int) -> Tensor:
    """(N, C, H, W) as contiguous (N, heads, head_dim, H, W), in the dtype of computation."""
    n, channels, height, width = x.shape
    x = x.to(compute_dtype(x.dtype)).contiguous()
    return x.view(n, num_heads, channels // num_heads, height, width)


def _to_compute(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(compute_dtype(x.dtype))


def _like(x: Tensor, like: Tensor) -> Tensor:
    """(N, heads, head_dim, H, W) written back in the shape, dtype and strides of ``like``."""
    return torch.empty_like(like).copy_(x.flatten(1, 2))
