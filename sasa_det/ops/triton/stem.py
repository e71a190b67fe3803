"""``stem_attention_pooled`` on CUDA, in Triton.

A program works on some blocks of one head at a time; what it reads of them is their pixels, what it
writes their maxima, and queries, keys, values and the output at full resolution exist in registers
only. Three channels make logits cheap without queries and keys: with the pixels x, a logit is
x_i^T (Wq^T Wk) x_j + x_i^T R_ij, R_ij being the query projection of the embedding of the pair. One
half of an embedding is its row's and one its column's: the forward adds up 4 + 4 numbers for the 16
keys of a query instead of computing each.

All is float32, in plain multiply-adds. Rounded for tensor cores, the positions of a block come so
close to each other that the maximum, and with it the gradient, would go to another one.

The gradients of the parameters are linear in sums over all blocks that the backward's programs
gather in registers, each for itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import StemCall, empty_pooled
from ..eager_stem import Stem
from .launch import Launch, cdiv, next_power_of_2, on_device, refuses_tensor

# As in attention.py; more here, because the last ones to run have the GPU to themselves.
_SUMMING_PROGRAMS = 4096
# Blocks that a program works on at once.
_FORWARD_TILE = 32
_BACKWARD_TILE = 2
# Of a head, that the forward works on at once: the values of a block must fit a thread's registers.
_CHANNELS = 8
_LOG2_E = 1.4426950408889634


def refuses(call: StemCall) -> str | None:
    reason = refuses_tensor(call.image)
    if reason is not None:
        return reason
    in_channels, block_size = call.image.shape[1], call.mixture.shape[-1]
    head_dim = call.query_weight.shape[0] // call.num_heads
    if in_channels > 3 or block_size > 4 or head_dim > 32:
        return (
            "it serves images of up to 3 channels, blocks of up to 4 x 4 positions and heads of up "
            f"to 32 channels, not {in_channels}, {block_size} x {block_size} and {head_dim}"
        )
    return None


def forward(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    pooled = empty_pooled(call)
    # As the kernel writes it.
    maximum = torch.empty_like(pooled, memory_format=torch.contiguous_format)
    sums = new_partial_sums(call, 2, maximum.shape[1], tile=_FORWARD_TILE)
    with on_device(call.image):
        forward_launch(call, Stem(call), maximum, sums).run()
    total, square_total = sums.sum(dim=0)
    return pooled.copy_(maximum), total.clone(), square_total.clone()


def backward(
    call: StemCall, grad_maximum: Tensor, grad_total: Tensor, grad_square_total: Tensor
) -> list[Tensor]:
    heads, padded_dim = call.num_heads, constants(call)["PADDED_DIM"]
    # As the kernel's inputs, but of the products one a query: (programs, heads, channels, ..., P).
    sums = [new_partial_sums(call, heads, 3, size, 16) for size in (4, 16, padded_dim)]
    with on_device(call.image):
        stem = Stem(call)
        grads = (grad_maximum, grad_total.contiguous(), grad_square_total.contiguous())
        backward_launch(call, stem, grads, sums).run()
        return _parameter_gradients(call, stem, [x.sum(dim=0) for x in sums])


def _parameter_gradients(call: StemCall, stem: Stem, sums: list[Tensor]) -> list[Tensor]:
    """From what the kernel sums; each (heads, 3, ..., P)."""
    heads, in_channels = call.num_heads, call.image.shape[1]
    positions, head_dim = call.mixture[0].numel(), call.query_weight.shape[0] // heads
    products, relative, value_weight = (x[:, :in_channels] for x in sums)
    products = products.sum(dim=3)[:, :, :in_channels]
    query_weight, key_weight = _by_head(stem.query_weight, heads), _by_head(stem.key_weight, heads)
    stem.grad_query_weight += torch.einsum("hij,hdj->hdi", products, key_weight).flatten(0, 1)
    stem.grad_key_weight += torch.einsum("hij,hdi->hdj", products, query_weight).flatten(0, 1)
    value_weight = value_weight[:, :, :head_dim, :positions]
    stem.grad_value_weight_at += value_weight.permute(3, 1, 0, 2).flatten(2)
    if stem.relative is not None:
        relative = relative[:, :, :positions, :positions]
        stem.grad_relative_weight_at += relative.permute(3, 1, 0, 2).flatten(2)
    return stem.parameter_gradients()


def forward_launch(call: StemCall, stem: Stem, maximum: Tensor, partial_sums: Tensor) -> Launch:
    from .stem_kernels import pooled_forward_kernel

    head_dim = maximum.shape[1] // call.num_heads
    chunks = cdiv(head_dim, _CHANNELS)
    constants = {
        "IN_CHANNELS": call.image.shape[1],
        "HEAD_DIM": head_dim,
        "CHANNELS": cdiv(head_dim, chunks),
        "BLOCK_SIZE": call.mixture.shape[-1],
        "BLOCKS": _FORWARD_TILE,
    }
    arguments = _image(call) | _forward_parameters(call, stem)
    arguments |= {"maximum": maximum, "partial_sums": partial_sums}
    grid = (call.num_heads * chunks, partial_sums.shape[0])
    options = {"num_warps": _FORWARD_TILE // 32, "num_stages": 1}  # a thread for each block
    return Launch(pooled_forward_kernel, grid, arguments, constants, options)


def backward_launch(
    call: StemCall, stem: Stem, grads: tuple[Tensor, Tensor, Tensor], sums: list[Tensor]
) -> Launch:
    from .stem_kernels import pooled_backward_kernel

    arguments = _image(call) | _backward_parameters(call, stem)
    names = ("grad_maximum", "grad_sum", "grad_square_sum")
    arguments |= dict(zip(names, grads)) | {"grad_maximum_strides": grads[0].stride()}
    arguments |= dict(zip(("grad_products", "grad_relative", "grad_value_weight"), sums))
    grid = (call.num_heads, sums[0].shape[0])
    options = {"num_warps": 1, "num_stages": 1}  # which need not wait for each other
    return Launch(pooled_backward_kernel, grid, arguments, constants(call), options)


def constants(call: StemCall) -> dict[str, Any]:
    """What the backward's kernel is compiled for."""
    head_dim = call.query_weight.shape[0] // call.num_heads
    return {
        "IN_CHANNELS": call.image.shape[1],
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(_least_rows(), next_power_of_2(head_dim)),
        "BLOCK_SIZE": call.mixture.shape[-1],
        "BLOCKS": _BACKWARD_TILE,
    }


def _least_rows() -> int:
    """Of a factor of ``tl.dot``."""
    from triton import __version__

    major, minor = __version__.split(".")[:2]
    return 16 if (int(major), int(minor)) < (3, 5) else 8


def _image(call: StemCall) -> dict[str, Any]:
    n, _, height, width = call.image.shape
    sizes = {"num_images": n, "height": height, "width": width}
    return {"image": call.image, "image_strides": call.image.stride(), **sizes}


def _forward_parameters(call: StemCall, stem: Stem) -> dict[str, Any]:
    """The parameters as the forward wants them: the input channels of a number side by side."""
    heads, (channels, in_channels) = call.num_heads, call.query_weight.shape
    offsets = 2 * call.mixture.shape[-1] - 1
    relative = stem.query_weight.new_zeros(heads, 2, offsets, in_channels)
    if call.rel_rows is not None and call.rel_cols is not None:
        # An embedding is one half of the row and one of the column, and so is its logit.
        embeddings = torch.stack([call.rel_rows, call.rel_cols], dim=1).to(stem.dtype)
        halves = stem.query_weight.view(heads, 2, channels // heads // 2, in_channels)
        relative = embeddings @ halves * _LOG2_E
    return {
        "products": _products(call, stem).mT.contiguous(),
        "relative": relative.contiguous(),
        "value_weight": stem.value_weight_at.permute(2, 0, 1).contiguous(),
    }


def _backward_parameters(call: StemCall, stem: Stem) -> dict[str, Any]:
    """As the backward wants them, each (heads, channels, ...), padded with zeros."""
    heads, products = call.num_heads, _products(call, stem)
    value_weight = stem.value_weight_at.unflatten(2, (heads, -1)).permute(2, 1, 3, 0)
    if stem.relative is None:
        relative = products.new_zeros(heads, 3, 16, 16)
    else:
        relative = stem.relative_weight_at.unflatten(2, (heads, -1)).permute(2, 1, 3, 0) * _LOG2_E
    return {
        "products": _pad(products, 3, 3),
        "relative": _pad(relative, 3, 16, 16),
        "value_weight": _pad(value_weight, 3, constants(call)["PADDED_DIM"], 16),
    }


def _products(call: StemCall, stem: Stem) -> Tensor:
    """Wq^T Wk of each head, (heads, C_in of the query, C_in of the key)."""
    query_weight = _by_head(stem.query_weight, call.num_heads)
    key_weight = _by_head(stem.key_weight, call.num_heads)
    return torch.einsum("hdi,hdj->hij", query_weight, key_weight) * _LOG2_E


def _by_head(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """``x`` with its last dimensions padded to these sizes, contiguous."""
    padding = [(0, size - old) for size, old in zip(sizes, x.shape[1:])]
    return F.pad(x, [n for pair in reversed(padding) for n in pair]).contiguous()


def new_partial_sums(call: StemCall, *shape: int, tile: int = _BACKWARD_TILE) -> Tensor:
    """Room for the sums of the programs of a head, each of which works on tiles of blocks."""
    n, _, height, width = call.image.shape
    block_size = call.mixture.shape[-1]
    tiles = cdiv(n * cdiv(height, block_size) * cdiv(width, block_size), tile)
    programs = min(tiles, cdiv(_SUMMING_PROGRAMS, call.num_heads))
    return call.image.new_empty(programs, *shape, dtype=torch.float32)
