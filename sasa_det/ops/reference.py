"""Eq. 3 as it is written, position by position, in float64: for tests and for reading."""

import torch
from torch import Tensor


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """The same contract as :func:`sasa_det.ops.local_attention`; returns float64, slowly."""
    n, channels, height, width = query.shape
    head_dim, radius = channels // num_heads, kernel_size // 2
    q, k, v = (x.double().view(n, num_heads, head_dim, height, width) for x in (query, key, value))
    rows = []
    for i in range(height):
        for j in range(width):
            logits, values = [], []
            for a in range(max(0, i - radius), min(height, i + radius + 1)):
                for b in range(max(0, j - radius), min(width, j + radius + 1)):
                    key_ab = k[..., a, b]
                    if rel_rows is not None and rel_cols is not None:
                        r_row = rel_rows[:, a - i + radius].double()
                        r_col = rel_cols[:, b - j + radius].double()
                        key_ab = key_ab + torch.cat([r_row, r_col], dim=-1)
                    logits.append((q[..., i, j] * key_ab).sum(dim=-1))
                    values.append(v[..., a, b])
            weights = torch.stack(logits, dim=-1).softmax(dim=-1)  # (N, heads, window)
            output = (weights.unsqueeze(-2) * torch.stack(values, dim=-1)).sum(dim=-1)
            rows.append(output.flatten(1))
    return torch.stack(rows, dim=-1).view(n, channels, height, width)


def stem_attention_reference(
    image: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weights: Tensor,
    mixture: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
) -> Tensor:
    """The same contract as :func:`sasa_det.ops.stem_attention`; returns float64, slowly."""
    n, _, height, width = image.shape
    channels, block_size = query_weight.shape[0], mixture.shape[-1]
    x = image.double()
    query = torch.einsum("oc,nchw->nohw", query_weight.double(), x)
    key = torch.einsum("oc,nchw->nohw", key_weight.double(), x)
    value = torch.zeros(n, channels, height, width, dtype=torch.float64, device=image.device)
    for a in range(height):
        for b in range(width):
            for m, weight in enumerate(value_weights.double()):
                p = mixture[m, a % block_size, b % block_size].double()
                value[:, :, a, b] += p * (x[:, :, a, b] @ weight.t())
    # Inside one block every position sees every other: a window of 2 * B - 1 clipped at the
    # block's border is the whole block.
    output = torch.empty_like(value)
    for top in range(0, height, block_size):
        for left in range(0, width, block_size):
            block = (..., slice(top, top + block_size), slice(left, left + block_size))
            output[block] = local_attention_reference(
                query[block].contiguous(),
                key[block].contiguous(),
                value[block].contiguous(),
                rel_rows,
                rel_cols,
                num_heads=num_heads,
                kernel_size=2 * block_size - 1,
            )
    return output
