"""``local_attention`` of maps of any size in plain PyTorch: a walk over the offsets of the window.

Each of the k * k offsets is a shifted view of the padded keys and values: no k * k copies of them
exist. Maps are kept with padded rows laid end to end, L = H * (W + 2 * radius) positions, so that
each shift is one contiguous stretch; what is computed for the padding is cut off at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NEG_INF = float("-inf")


class ShiftedAttention:
    """One call.

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
        # Offsets that leave the map from every position are skipped.
        self.row_radius = min(kernel_size // 2, self.height - 1)
        self.col_radius = min(kernel_size // 2, self.width - 1)
        self.used_rows = _used_offsets(kernel_size, self.row_radius)
        self.used_cols = _used_offsets(kernel_size, self.col_radius)
        self.padded_width = self.width + 2 * self.col_radius
        self.query = self._lay_out(query)
        self.padded_key, self.padded_value = self._pad(key), self._pad(value)
        self.product = torch.empty_like(self.query)  # scratch
        self.rel_rows, self.rel_cols = rel_rows, rel_cols
        # (offsets, L): zero inside the map, minus infinity outside.
        self.row_logits = self._row_mask(query)
        self.col_logits = self._col_mask(query)
        if rel_rows is not None and rel_cols is not None:
            # q . r in its factorised form: (N, heads, offsets, L).
            query_rows, query_cols = self.query.split(self.half, dim=2)
            self.row_logits = self.row_logits + rel_rows[:, self.used_rows] @ query_rows
            self.col_logits = self.col_logits + rel_cols[:, self.used_cols] @ query_cols

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (N, heads, head_dim, H, W) and the log-sum-exp (N, heads, H, W).

        Softmax runs online over the row offsets, so that scratch memory does not grow with k * k.
        """
        output = torch.zeros_like(self.query)
        maximum = torch.full_like(self.query[:, :, 0], _NEG_INF)
        total = torch.zeros_like(maximum)
        # From the centre outwards: the centre row is inside the map for every position, so the
        # maximum is finite from the first step on.
        rows = range(2 * self.row_radius + 1)
        for row in sorted(rows, key=lambda a: abs(a - self.row_radius)):
            logits = self._logits(row)
            new_maximum = torch.maximum(maximum, logits.amax(dim=2))
            rescale = (maximum - new_maximum).exp_()
            maximum = new_maximum
            weights = logits.sub_(maximum.unsqueeze(2)).exp_()
            total.mul_(rescale).add_(weights.sum(dim=2))
            output.mul_(rescale.unsqueeze(2))
            for col in range(weights.shape[2]):
                value = self._shift(self.padded_value, row, col)
                output.addcmul_(weights[:, :, col, None], value)
        output /= total.unsqueeze(2)
        # Contiguous, as the fake implementation promises to torch.compile.
        return self._as_map(output), self._as_map(maximum + total.log()).contiguous()

    def backward(self, grad: Tensor, output: Tensor, logsumexp: Tensor) -> list[Tensor]:
        """Gradients of query, key, value, and of the embeddings if there are any."""
        # Zero in the padding, and so is everything that comes from there.
        grad, output = self._lay_out(grad), self._lay_out(output)
        logsumexp = self._lay_out(logsumexp).unsqueeze(2)
        mean = (grad * output).sum(dim=2, keepdim=True)
        grad_query = torch.zeros_like(self.query)
        grad_padded_key = torch.zeros_like(self.padded_key)
        grad_padded_value = torch.zeros_like(self.padded_value)
        grad_rows = []
        grad_cols = torch.zeros((), dtype=grad.dtype, device=grad.device)
        for row in range(2 * self.row_radius + 1):
            weights = self._logits(row).sub_(logsumexp).exp_()
            grad_logits = self._dots(grad, self.padded_value, row).sub_(mean).mul_(weights)
            for col in range(weights.shape[2]):
                grad_logit = grad_logits[:, :, col, None]
                grad_query.addcmul_(grad_logit, self._shift(self.padded_key, row, col))
                self._shift(grad_padded_key, row, col).addcmul_(grad_logit, self.query)
                grad_value = self._shift(grad_padded_value, row, col)
                grad_value.addcmul_(weights[:, :, col, None], grad)
            grad_rows.append(grad_logits.sum(dim=2))
            grad_cols = grad_cols + grad_logits
        embedding_grads = []
        if self.rel_rows is not None and self.rel_cols is not None:
            for grad_logits, embeddings, used, channels in (
                (torch.stack(grad_rows, 2), self.rel_rows, self.used_rows, slice(0, self.half)),
                (grad_cols, self.rel_cols, self.used_cols, slice(self.half, None)),
            ):
                grad_query[:, :, channels] += embeddings[:, used].transpose(1, 2) @ grad_logits
                by_image = grad_logits @ self.query[:, :, channels].transpose(2, 3)
                embedding_grad = torch.zeros_like(embeddings)
                embedding_grad[:, used] = by_image.sum(dim=0)
                embedding_grads.append(embedding_grad)
        maps = [self._as_map(grad_query), self._crop(grad_padded_key)]
        return [*maps, self._crop(grad_padded_value), *embedding_grads]

    def weights(self) -> Tensor:
        """All attention weights, (N, heads, rows, columns, H, W) of the offsets that are used."""
        rows = [self._as_map(self._logits(row)) for row in range(2 * self.row_radius + 1)]
        logits = torch.stack(rows, dim=2)
        return logits.flatten(2, 3).softmax(dim=2).unflatten(2, logits.shape[2:4])

    def _logits(self, row: int) -> Tensor:
        """(N, heads, column offsets, L) of one row offset."""
        logits = self._dots(self.query, self.padded_key, row)
        logits += self.col_logits
        logits += self.row_logits[..., row : row + 1, :]
        return logits

    def _dots(self, x: Tensor, padded: Tensor, row: int) -> Tensor:
        """Sum over head_dim of x times each column shift of ``padded``, as ``_logits``."""
        n, heads, _, length = x.shape
        num_cols = 2 * self.col_radius + 1
        dots = x.new_empty(n, heads, num_cols, length)
        for col in range(num_cols):
            torch.mul(x, self._shift(padded, row, col), out=self.product)
            torch.sum(self.product, dim=2, out=dots[:, :, col])
        return dots

    def _lay_out(self, x: Tensor) -> Tensor:
        """(..., H, W) to (..., L), zeros after each row."""
        return F.pad(x, (0, 2 * self.col_radius)).flatten(-2)

    def _as_map(self, x: Tensor) -> Tensor:
        """(..., L) to (..., H, W): the inverse of ``_lay_out``."""
        return x.unflatten(-1, (self.height, self.padded_width))[..., : self.width]

    def _pad(self, x: Tensor) -> Tensor:
        """(..., H, W) laid out with zeros all around, as far as the offsets reach."""
        rows, cols = self.row_radius, self.col_radius
        # The last shift of the last row's padding reaches 2 * cols positions further.
        return F.pad(F.pad(x, (cols, cols, rows, rows)).flatten(-2), (0, 2 * cols))

    def _crop(self, padded: Tensor) -> Tensor:
        return self._as_map(self._shift(padded, self.row_radius, self.col_radius))

    def _shift(self, padded: Tensor, row: int, col: int) -> Tensor:
        """The L positions as seen at the ``row``-th row and ``col``-th column offset: a view."""
        start = row * self.padded_width + col
        return padded[..., start : start + self.height * self.padded_width]

    def _row_mask(self, like: Tensor) -> Tensor:
        mask = _outside(self.height, self.row_radius, like)
        return mask.repeat_interleave(self.padded_width, dim=1)

    def _col_mask(self, like: Tensor) -> Tensor:
        # In the padding itself nothing is masked: a softmax over nothing would be NaN.
        mask = F.pad(_outside(self.width, self.col_radius, like), (0, 2 * self.col_radius))
        return mask.repeat(1, self.height)


def _used_offsets(kernel_size: int, radius: int) -> slice:
    return slice(kernel_size // 2 - radius, kernel_size // 2 + radius + 1)


def _outside(size: int, radius: int, like: Tensor) -> Tensor:
    """(offsets, size): minus infinity where position + offset leaves [0, size), else zero."""
    offsets = torch.arange(-radius, radius + 1, device=like.device)[:, None]
    target = torch.arange(size, device=like.device) + offsets
    outside = (target < 0) | (target >= size)
    return torch.zeros_like(target, dtype=like.dtype).masked_fill_(outside, _NEG_INF)
