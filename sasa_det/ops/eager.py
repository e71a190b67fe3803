"""The operators in plain PyTorch, for every device and dtype.

``local_attention`` walks over the k*k offsets of the window and works with shifted views of the
padded keys and values: no k*k copies of them exist, and beside the inputs only the output and the
log-sum-exp of the logits are kept for the backward, which computes the weights anew.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_NEG_INF = float("-inf")


class _Window:
    """The shifted views of one call, and the position logits that mask what lies outside the map.

    Args:
        query (Tensor[N, heads, head_dim, H, W]): already in the dtype of the computation.
        rel_rows, rel_cols: as in :func:`sasa_det.ops.local_attention`, or None.
        kernel_size (int): side of the window.
    """

    def __init__(
        self, query: Tensor, rel_rows: Tensor | None, rel_cols: Tensor | None, kernel_size: int
    ) -> None:
        self.height, self.width = query.shape[-2:]
        # Offsets that leave the map from every position are skipped: on P6 and P7 most of them.
        self.row_radius = min(kernel_size // 2, self.height - 1)
        self.col_radius = min(kernel_size // 2, self.width - 1)
        self.rows = _used_offsets(kernel_size, self.row_radius)
        self.cols = _used_offsets(kernel_size, self.col_radius)
        half = query.shape[2] // 2
        # (offsets, H, 1) and (offsets, 1, W): zero inside the map, minus infinity outside.
        self.row_logits = _outside(self.height, self.row_radius, query).unsqueeze(-1)
        self.col_logits = _outside(self.width, self.col_radius, query).unsqueeze(-2)
        if rel_rows is not None and rel_cols is not None:
            self.row_logits = self.row_logits + _position_logits(
                query[:, :, :half], rel_rows[:, self.rows]
            )
            self.col_logits = self.col_logits + _position_logits(
                query[:, :, half:], rel_cols[:, self.cols]
            )

    def pad(self, x: Tensor) -> Tensor:
        """(N, heads, head_dim, H, W) with zeros around it, as far as the offsets reach."""
        rows, cols = self.row_radius, self.col_radius
        return F.pad(x, (cols, cols, rows, rows))

    def crop(self, padded: Tensor) -> Tensor:
        return self.shift(padded, self.row_radius, self.col_radius)

    def shift(self, padded: Tensor, row: int, col: int) -> Tensor:
        """The map as seen at the ``row``-th row and ``col``-th column offset: a view."""
        return padded[..., row : row + self.height, col : col + self.width]

    def row_offsets(self) -> Iterator[int]:
        """From the centre outwards: the centre row is inside the map for every position, so the
        running maximum of the logits is finite from the first step on."""
        return iter(sorted(range(2 * self.row_radius + 1), key=lambda a: abs(a - self.row_radius)))

    def logits(self, query: Tensor, padded_key: Tensor, row: int, product: Tensor) -> Tensor:
        """(N, heads, column offsets, H, W) of one row offset; ``product`` is a scratch tensor."""
        logits = _dots(self, query, padded_key, row, product)
        logits += self.col_logits
        logits += self.row_logits[..., row : row + 1, :, :]
        return logits


def local_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    kernel_size: int,
) -> tuple[Tensor, Tensor]:
    """The output and the log-sum-exp of the logits, (N, heads, H, W), in the dtype of computation.

    Softmax runs online over the row offsets, so that scratch memory does not grow with k * k.
    """
    q, k, v, rows, cols = _to_compute(num_heads, query, key, value, rel_rows, rel_cols)
    window = _Window(q, rows, cols, kernel_size)
    padded_key, padded_value = window.pad(k), window.pad(v)
    product, output = torch.empty_like(q), torch.zeros_like(q)
    maximum = torch.full_like(q[:, :, 0], _NEG_INF)
    total = torch.zeros_like(maximum)
    for row in window.row_offsets():
        logits = window.logits(q, padded_key, row, product)
        new_maximum = torch.maximum(maximum, logits.amax(dim=2))
        rescale = (maximum - new_maximum).exp_()
        maximum = new_maximum
        weights = logits.sub_(maximum.unsqueeze(2)).exp_()
        total.mul_(rescale).add_(weights.sum(dim=2))
        output.mul_(rescale.unsqueeze(2))
        for col in range(weights.shape[2]):
            output.addcmul_(weights[:, :, col, None], window.shift(padded_value, row, col))
    output /= total.unsqueeze(2)
    return _like(output, query), maximum + total.log()


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
    """Gradients of query, key, value and, unless they are None, of the two embeddings.

    The weights are recomputed from the log-sum-exp.
    """
    q, k, v, rows, cols = _to_compute(num_heads, query, key, value, rel_rows, rel_cols)
    g, y, *_ = _to_compute(num_heads, grad_output, output, output, None, None)
    window = _Window(q, rows, cols, kernel_size)
    padded_key, padded_value = window.pad(k), window.pad(v)
    grad_q = torch.zeros_like(q)
    grad_padded_key, grad_padded_value = (torch.zeros_like(x) for x in (padded_key, padded_value))
    product = torch.empty_like(q)
    row_sums = []
    col_sums = torch.zeros((), dtype=q.dtype, device=q.device)
    mean = (g * y).sum(dim=2).unsqueeze(2)  # sum over the window of weight * d loss / d weight
    for row in range(2 * window.row_radius + 1):
        weights = window.logits(q, padded_key, row, product).sub_(logsumexp.unsqueeze(2)).exp_()
        grad_logits = _dots(window, g, padded_value, row, product).sub_(mean).mul_(weights)
        for col in range(weights.shape[2]):
            grad_logit = grad_logits[:, :, col, None]
            grad_q.addcmul_(grad_logit, window.shift(padded_key, row, col))
            window.shift(grad_padded_key, row, col).addcmul_(grad_logit, q)
            window.shift(grad_padded_value, row, col).addcmul_(weights[:, :, col, None], g)
        row_sums.append(grad_logits.sum(dim=2))
        col_sums = col_sums + grad_logits
    grads = []
    if rows is not None and cols is not None:
        half = q.shape[2] // 2
        row_grads = torch.stack(row_sums, dim=2)
        for grad_logits, channels, embeddings, used in (
            (row_grads, slice(None, half), rows, window.rows),
            (col_sums, slice(half, None), cols, window.cols),
        ):
            grad_embeddings = _position_logits_backward(
                grad_logits, q[:, :, channels], embeddings, used, grad_q[:, :, channels]
            )
            grads.append(grad_embeddings.to(query.dtype))
    return [
        _like(grad_q, query),
        _like(window.crop(grad_padded_key), key),
        _like(window.crop(grad_padded_value), value),
        *grads,
    ]


def local_attention_weights(
    query: Tensor,
    key: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """(N, heads, k * k, H, W); zero for the offsets that leave the map."""
    q, k, _, rows, cols = _to_compute(num_heads, query, key, key, rel_rows, rel_cols)
    window = _Window(q, rows, cols, kernel_size)
    padded_key, product = window.pad(k), torch.empty_like(q)
    n, heads, _, height, width = q.shape
    logits = q.new_full((n, heads, kernel_size, kernel_size, height, width), _NEG_INF)
    used = logits[:, :, window.rows, window.cols]
    for row in range(used.shape[2]):
        used[:, :, row] = window.logits(q, padded_key, row, product)
    return logits.flatten(2, 3).softmax(dim=2)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _to_compute(
    num_heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Maps as contiguous (N, heads, head_dim, H, W) and embeddings, in the dtype of computation."""
    dtype = compute_dtype(query.dtype)

    def split(x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        x = x.to(dtype).contiguous()
        return x.view(n, num_heads, channels // num_heads, height, width)

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return split(query), split(key), split(value), cast(rel_rows), cast(rel_cols)


def _like(x: Tensor, like: Tensor) -> Tensor:
    """(N, heads, head_dim, H, W) written back in the shape, dtype and strides of ``like``."""
    return torch.empty_like(like).copy_(x.flatten(1, 2))


def _used_offsets(kernel_size: int, radius: int) -> slice:
    return slice(kernel_size // 2 - radius, kernel_size // 2 + radius + 1)


def _outside(size: int, radius: int, like: Tensor) -> Tensor:
    """(offsets, size): minus infinity where position + offset leaves [0, size), else zero."""
    offsets = torch.arange(-radius, radius + 1, device=like.device)[:, None]
    target = torch.arange(size, device=like.device) + offsets
    outside = (target < 0) | (target >= size)
    return torch.zeros_like(target, dtype=like.dtype).masked_fill_(outside, _NEG_INF)


def _position_logits(half_query: Tensor, embeddings: Tensor) -> Tensor:
    """q . r for each of k offsets, (N, heads, k, H, W): the factorised form."""
    return torch.einsum("nhdyx,hkd->nhkyx", half_query, embeddings)


def _position_logits_backward(
    grad_logits: Tensor, half_query: Tensor, embeddings: Tensor, used: slice, grad_query: Tensor
) -> Tensor:
    """Adds to ``grad_query`` in place, and returns the gradient of all the embeddings."""
    grad_query += torch.einsum("nhkyx,hkd->nhdyx", grad_logits, embeddings[:, used])
    grad_embeddings = torch.zeros_like(embeddings)
    grad_embeddings[:, used] = torch.einsum("nhkyx,nhdyx->hkd", grad_logits, half_query)
    return grad_embeddings


def _dots(window: _Window, x: Tensor, padded: Tensor, row: int, product: Tensor) -> Tensor:
    """Sum over head_dim of x times each column shift of ``padded``: (N, heads, cols, H, W)."""
    n, heads, _, height, width = x.shape
    num_cols = 2 * window.col_radius + 1
    dots = x.new_empty(n, heads, num_cols, height, width)
    for col in range(num_cols):
        torch.mul(x, window.shift(padded, row, col), out=product)
        torch.sum(product, dim=2, out=dots[:, :, col])
    return dots
