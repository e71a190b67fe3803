"""The stem's attention in plain PyTorch."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import StemCall, compute_dtype

# Blocks worked on at once. Bounds the scratch memory whatever the size of the images, and keeps its
# allocations small enough to be reused: at 4096 blocks, fresh pages took most of the time.
CHUNK = 1024


def refuses(call: StemCall) -> None:
    """It serves every call."""


def forward(call: StemCall) -> Tensor:
    blocks = Blocks(call)
    output = [blocks.stem.forward(*chunk) for chunk in blocks.chunks()]
    return from_blocks(torch.cat(output, dim=1), call)


def backward(call: StemCall, grad_output: Tensor, image_gradient: bool) -> list[Tensor]:
    """Gradients of the tensors that are not None; each chunk of blocks is computed anew.

    That of the image comes first, and only if asked for: a detector's image needs none.
    """
    blocks = Blocks(call)
    grads = _to_blocks(grad_output.to(blocks.stem.dtype), blocks.stem.block_size)
    grad_pixels = []
    for chunk, grad in zip(blocks.chunks(), grads.split(CHUNK, dim=1)):
        stem_grads = blocks.stem.backward(grad, *chunk)
        if image_gradient:
            grad_pixels.append(blocks.stem.pixel_gradient(*stem_grads))
    grads_of_parameters = blocks.stem.parameter_gradients()
    if not image_gradient:
        return grads_of_parameters
    return [from_blocks(torch.cat(grad_pixels, dim=1), call), *grads_of_parameters]


def weights(call: StemCall) -> Tensor:
    """(N, heads, B * B, H, W); zero for the positions that are outside the image."""
    call = call._replace(image=call.image.to(compute_dtype(call.image.dtype)))
    blocks = Blocks(call)
    by_chunk = [blocks.stem.weights(*chunk) for chunk in blocks.chunks()]
    return from_blocks(torch.cat(by_chunk, dim=1), call).unflatten(1, (call.num_heads, -1))


class Blocks:
    """The blocks of a call's images, and the stem's attention in them.

    T counts blocks, P = B * B the positions of a block. Positions that the last blocks have outside
    the image are zeros.
    """

    def __init__(self, call: StemCall) -> None:
        image = call.image
        self.stem = Stem(call)
        size = self.stem.block_size
        self.pixels = _to_blocks(image.to(self.stem.dtype), size)
        self.outside: Tensor | None = None
        if image.shape[2] % size or image.shape[3] % size:
            self.outside = _to_blocks(torch.ones_like(image[:, :1]), size).squeeze(-1) == 0

    def chunks(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Pixels (P, T, C_in), and which of them are outside (P, T), of some blocks at a time."""
        pixels = self.pixels.split(CHUNK, dim=1)
        if self.outside is None:
            return zip(pixels, [None] * len(pixels))
        return zip(pixels, self.outside.split(CHUNK, dim=1))


class Stem:
    """The parameters of a call in the dtype of the computation, and their gradients so far.

    d is head_dim; T and P as in :class:`Blocks`. Positions lead in memory,
    (P, T * heads, d), because then every projection is one batched matrix product and every
    operand of the attention a strided view: with blocks this small, copies would cost the most.
    """

    def __init__(self, call: StemCall) -> None:
        self.dtype = compute_dtype(call.image.dtype)
        self.parameter_dtype = call.image.dtype
        self.num_heads = call.num_heads
        self.block_size = call.mixture.shape[-1]
        self.query_weight = call.query_weight.to(self.dtype)
        self.key_weight = call.key_weight.to(self.dtype)
        self.value_weights = call.value_weights.to(self.dtype)
        self.mixture = call.mixture.to(self.dtype).flatten(1)
        # The mixture is linear in the weights, so the M projections become one for each position.
        self.value_weight_at = torch.einsum("mp,moi->pio", self.mixture, self.value_weights)
        self.grad_query_weight = torch.zeros_like(self.query_weight)
        self.grad_key_weight = torch.zeros_like(self.key_weight)
        self.grad_value_weight_at = torch.zeros_like(self.value_weight_at)
        self.relative: Tensor | None = None
        if call.rel_rows is not None and call.rel_cols is not None:
            self.relative = _block_embeddings(
                call.rel_rows.to(self.dtype), call.rel_cols.to(self.dtype), self.block_size
            )
            # q . r is linear in the few channels of the pixel: (P queries, C_in, heads * P keys).
            self.relative_weight_at = torch.einsum(
                "hdi,hpsd->pihs", self._by_head(self.query_weight), self.relative
            ).flatten(2)
            self.grad_relative_weight_at = torch.zeros_like(self.relative_weight_at)

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.num_heads, -1))

    def _split(self, x: Tensor) -> Tensor:
        """(P, T, heads * e) to a view (T * heads, P, e)."""
        return x.unflatten(2, (self.num_heads, -1)).flatten(1, 2).transpose(0, 1)

    def _merge(self, x: Tensor) -> Tensor:
        """The inverse of ``_split``, in memory of its own."""
        return x.transpose(0, 1).contiguous().unflatten(1, (-1, self.num_heads)).flatten(2)

    def _attend(self, pixels: Tensor, outside: Tensor | None) -> tuple[Tensor, ...]:
        """The queries, keys, values (T * heads, P, d) and attention weights (T * heads, P, P)."""
        query = self._split(pixels @ self.query_weight.t())
        key = self._split(pixels @ self.key_weight.t())
        value = self._split(torch.bmm(pixels, self.value_weight_at))
        if self.relative is None:
            logits = torch.bmm(query, key.transpose(1, 2))
        else:
            position_logits = self._split(torch.bmm(pixels, self.relative_weight_at))
            logits = torch.baddbmm(position_logits, query, key.transpose(1, 2))
        if outside is not None:
            mask = outside.t().repeat_interleave(self.num_heads, dim=0).unsqueeze(1)
            logits.masked_fill_(mask, float("-inf"))
        return query, key, value, logits.softmax(dim=-1)

    def forward(self, pixels: Tensor, outside: Tensor | None) -> Tensor:
        """(P, T, C_in) pixels to (P, T, C); keys that are ``outside`` (P, T) take no part."""
        *_, value, weights = self._attend(pixels, outside)
        return self._merge(torch.bmm(weights, value))

    def weights(self, pixels: Tensor, outside: Tensor | None) -> Tensor:
        """(P, T, C_in) pixels to (P queries, T, heads * P keys)."""
        return self._merge(self._attend(pixels, outside)[-1])

    def backward(
        self, grad: Tensor, pixels: Tensor, outside: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gathers the gradients of the parameters.

        Returns what :meth:`pixel_gradient` takes: the gradients of queries, keys, values and
        position logits.
        """
        query, key, value, weights = self._attend(pixels, outside)
        grad = self._split(grad)
        grad_value = self._merge(torch.bmm(weights.transpose(1, 2), grad))
        grad_weights = torch.bmm(grad, value.transpose(1, 2))
        grad_weights -= (grad_weights * weights).sum(dim=-1, keepdim=True)
        grad_logits = grad_weights.mul_(weights)
        grad_query = self._merge(torch.bmm(grad_logits, key))
        grad_key = self._merge(torch.bmm(grad_logits.transpose(1, 2), query))
        pixels_t = pixels.transpose(1, 2)
        self.grad_query_weight += torch.bmm(pixels_t, grad_query).sum(dim=0).t()
        self.grad_key_weight += torch.bmm(pixels_t, grad_key).sum(dim=0).t()
        self.grad_value_weight_at += torch.bmm(pixels_t, grad_value)
        grad_relative = None
        if self.relative is not None:
            grad_relative = self._merge(grad_logits)
            self.grad_relative_weight_at += torch.bmm(pixels_t, grad_relative)
        return grad_query, grad_key, grad_value, grad_relative

    def pixel_gradient(
        self,
        grad_query: Tensor,
        grad_key: Tensor,
        grad_value: Tensor,
        grad_relative: Tensor | None,
    ) -> Tensor:
        """The gradient of the pixels, (P, T, C_in)."""
        grad = grad_query @ self.query_weight + grad_key @ self.key_weight
        grad += torch.bmm(grad_value, self.value_weight_at.transpose(1, 2))
        if grad_relative is not None:
            grad += torch.bmm(grad_relative, self.relative_weight_at.transpose(1, 2))
        return grad

    def parameter_gradients(self) -> list[Tensor]:
        """In the order of the operator's arguments."""
        grad_query_weight = self.grad_query_weight
        grad_embeddings = []
        if self.relative is not None:
            grad_at = self.grad_relative_weight_at.unflatten(2, (self.num_heads, -1))
            grad_relative = torch.einsum(
                "pihs,hdi->hpsd", grad_at, self._by_head(self.query_weight)
            )
            grad_embeddings = _block_embeddings_backward(grad_relative, self.block_size)
            by_head = torch.einsum("pihs,hpsd->hdi", grad_at, self.relative)
            grad_query_weight = grad_query_weight + by_head.flatten(0, 1)
        grad_at = self.grad_value_weight_at
        grad_mixture = torch.einsum("pio,moi->mp", grad_at, self.value_weights)
        grads = [
            grad_query_weight,
            self.grad_key_weight,
            torch.einsum("pio,mp->moi", grad_at, self.mixture),
            grad_mixture.unflatten(1, (self.block_size, self.block_size)),
            *grad_embeddings,
        ]
        # Contiguous, as the fake implementation promises.
        return [grad.to(self.parameter_dtype).contiguous() for grad in grads]


def _block_embeddings(rel_rows: Tensor, rel_cols: Tensor, block_size: int) -> Tensor:
    """r for each pair of positions in a block: (heads, P queries, P keys, d)."""
    offset = _offset_index(block_size, rel_rows)
    full = (block_size,) * 4
    rows = rel_rows[:, offset][:, :, None, :, None].expand(-1, *full, -1)
    cols = rel_cols[:, offset][:, None, :, None, :].expand(-1, *full, -1)
    relative = torch.cat([rows, cols], dim=-1)  # (heads, qrow, qcol, krow, kcol, d)
    return relative.flatten(3, 4).flatten(1, 2)


def _block_embeddings_backward(grad: Tensor, block_size: int) -> list[Tensor]:
    offset = _offset_index(block_size, grad).flatten()
    grad = grad.unflatten(2, (block_size, -1)).unflatten(1, (block_size, -1))
    grad_rows, grad_cols = grad.chunk(2, dim=-1)
    grads = []
    for by_pair in (grad_rows.sum(dim=(2, 4)), grad_cols.sum(dim=(1, 3))):
        heads, _, _, half = by_pair.shape
        total = by_pair.new_zeros(heads, 2 * block_size - 1, half)
        grads.append(total.index_add_(1, offset, by_pair.flatten(1, 2)))
    return grads


def _offset_index(block_size: int, like: Tensor) -> Tensor:
    """[query, key]: the index of the embedding of key - query."""
    index = torch.arange(block_size, device=like.device)
    return index[None, :] - index[:, None] + block_size - 1


def _to_blocks(image: Tensor, block_size: int) -> Tensor:
    """(N, C, H, W) to (P, T, C), zeros where the last blocks reach over the border."""
    _, _, height, width = image.shape
    x = F.pad(image, (0, -width % block_size, 0, -height % block_size))
    x = x.unflatten(3, (-1, block_size)).unflatten(2, (-1, block_size))
    return x.permute(3, 5, 0, 2, 4, 1).flatten(2, 4).flatten(0, 1)


def from_blocks(blocks: Tensor, call: StemCall) -> Tensor:
    """(P, T, C) to (N, C, H, W), cropped to the image and in its dtype."""
    n, _, height, width = call.image.shape
    block_size = call.mixture.shape[-1]
    rows, cols = -(-height // block_size), -(-width // block_size)
    channels = blocks.shape[-1]
    x = blocks.view(block_size, block_size, n, rows, cols, channels).permute(2, 5, 3, 0, 4, 1)
    x = x.reshape(n, channels, rows * block_size, cols * block_size)
    return x[:, :, :height, :width].to(call.image.dtype).contiguous()
