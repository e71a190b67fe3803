"""``local_attention`` of small maps in plain PyTorch: all pairs of positions, masked to the window.

On P5 to P7 and in the last stages a window of k x k is most of the map or larger than it, and a few
matrix products cost less than a walk over k * k offsets. The results are the same.
"""

import torch
from torch import Tensor


class DenseAttention:
    """One call. H, W stand for the query's position, Y, X for the key's.

    Args:
        query, key, value (Tensor[N, heads, head_dim, H, W]): in the dtype of the computation.
        rel_rows, rel_cols: as in :func:`sasa_det.ops.local_attention`, or None.
        kernel_size (int): side of the window.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rel_rows: Tensor | None,
        rel_cols: Tensor | None,
        kernel_size: int,
    ) -> None:
        self.height, self.width = query.shape[-2:]
        self.half = query.shape[2] // 2
        self.query_map = query
        self.query, self.key, self.value = (x.flatten(3) for x in (query, key, value))
        self.rows = _Axis(self.height, kernel_size, rel_rows, query)
        self.cols = _Axis(self.width, kernel_size, rel_cols, query)

    def _by_axis(self, x: Tensor) -> Tensor:
        """(N, heads, H * W, Y * X) to (N, heads, H, W, Y, X)."""
        return x.unflatten(3, (self.height, self.width)).unflatten(2, (self.height, self.width))

    def logits(self) -> Tensor:
        """(N, heads, H * W, Y * X), minus infinity outside the window."""
        logits = self.query.transpose(2, 3) @ self.key
        by_axis = self._by_axis(logits)
        row_logits: Tensor = self.rows.mask[:, None]  # (H, W, Y) by broadcasting
        col_logits: Tensor = self.cols.mask[None, :]  # (H, W, X)
        if self.rows.embeddings is not None and self.cols.embeddings is not None:
            query_rows, query_cols = self.query_map.split(self.half, dim=2)
            row_logits = row_logits + torch.einsum(
                "nadhw,ahyd->nahwy", query_rows, self.rows.embeddings
            )
            col_logits = col_logits + torch.einsum(
                "nadhw,awxd->nahwx", query_cols, self.cols.embeddings
            )
        by_axis += row_logits[..., :, None]
        by_axis += col_logits[..., None, :]
        return logits

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (N, heads, head_dim, H, W) and the log-sum-exp (N, heads, H, W)."""
        logits = self.logits()
        logsumexp = logits.logsumexp(dim=3)
        output = self.value @ logits.softmax(dim=3).transpose(2, 3)
        size = (self.height, self.width)
        return output.unflatten(3, size), logsumexp.unflatten(2, size)

    def backward(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> list[Tensor]:
        """Gradients of query, key, value, and of the embeddings if there are any."""
        weights = self.logits().sub_(logsumexp.flatten(2).unsqueeze(3)).exp_()
        mean = (grad * output).sum(dim=2).flatten(2).unsqueeze(3)
        grad = grad.flatten(3)
        grad_value = grad @ weights
        grad_logits = (grad.transpose(2, 3) @ self.value).sub_(mean).mul_(weights)
        grad_query = (self.key @ grad_logits.transpose(2, 3)).view_as(self.query_map)
        grad_key = self.query @ grad_logits
        grads = [grad_query, grad_key.view_as(grad_query), grad_value.view_as(grad_query)]
        if self.rows.embeddings is not None and self.cols.embeddings is not None:
            by_axis = self._by_axis(grad_logits)
            grad_rows, grad_cols = by_axis.sum(dim=5), by_axis.sum(dim=4)
            query_rows, query_cols = self.query_map.split(self.half, dim=2)
            grad_query[:, :, : self.half] += torch.einsum(
                "nahwy,ahyd->nadhw", grad_rows, self.rows.embeddings
            )
            grad_query[:, :, self.half :] += torch.einsum(
                "nahwx,awxd->nadhw", grad_cols, self.cols.embeddings
            )
            by_row = torch.einsum("nahwy,nadhw->ahyd", grad_rows, query_rows)
            by_col = torch.einsum("nahwx,nadhw->awxd", grad_cols, query_cols)
            grads += [self.rows.gather(by_row), self.cols.gather(by_col)]
        return grads


class _Axis:
    """Rows or columns: which pairs lie within the window, and the embedding of each pair.

    Attributes:
        mask (Tensor[size, size]): [query, key], zero within the window, minus infinity outside.
        embeddings (Tensor[heads, size, size, head_dim // 2] or None): of each pair.
    """

    def __init__(
        self, size: int, kernel_size: int, embeddings: Tensor | None, like: Tensor
    ) -> None:
        radius = kernel_size // 2
        position = torch.arange(size, device=like.device)
        offset = position[None, :] - position[:, None]
        outside = offset.abs() > radius
        self.mask = torch.zeros(size, size, dtype=like.dtype, device=like.device)
        self.mask.masked_fill_(outside, float("-inf"))
        # Outside the window any embedding will do: the mask hides it.
        self.index = (offset + radius).clamp(0, kernel_size - 1).flatten()
        self.num_offsets = kernel_size
        self.embeddings: Tensor | None = None
        if embeddings is not None:
            self.embeddings = embeddings[:, self.index].unflatten(1, (size, size))

    def gather(self, grad: Tensor) -> Tensor:
        """The gradient of the pairs summed by offset: (heads, kernel_size, head_dim // 2)."""
        total = grad.new_zeros(grad.shape[0], self.num_offsets, grad.shape[-1])
        return total.index_add_(1, self.index, grad.flatten(1, 2))
