"""``stem_attention_pooled`` on CUDA, in Triton.

A program works on some blocks of one head at a time; what it reads of them is their pixels, what it
writes their maxima, and queries, keys, values and the output at full resolution exist in registers
only. Three channels make logits cheap without queries and keys: with the pixels x, a logit is
x_i^T (Wq^T Wk) x_j + x_i^T R_ij, R_ij being the query projection of the embedding of the pair.

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

# As in attention.py.
_SUMMING_PROGRAMS = 2048
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
    sums = new_partial_sums(call, 2, call.num_heads, constants(call)["PADDED_DIM"])
    with on_device(call.image):
        forward_launch(call, Stem(call), maximum, sums).run()
    head_dim = maximum.shape[1] // call.num_heads
    total, square_total = sums.sum(dim=0)[..., :head_dim].flatten(1)
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

    arguments = _arguments(call, stem)
    arguments |= {"maximum": maximum, "partial_sums": partial_sums}
    grid = (call.num_heads, partial_sums.shape[0])
    options = {"num_warps": 1, "num_stages": 1}
    return Launch(pooled_forward_kernel, grid, arguments, constants(call), options)


def backward_launch(
    call: StemCall, stem: Stem, grads: tuple[Tensor, Tensor, Tensor], sums: list[Tensor]
) -> Launch:
    from .stem_kernels import pooled_backward_kernel

    arguments = _arguments(call, stem)
    names = ("grad_maximum", "grad_sum", "grad_square_sum")
    arguments |= dict(zip(names, grads)) | {"grad_maximum_strides": grads[0].stride()}
    arguments |= dict(zip(("grad_products", "grad_relative", "grad_value_weight"), sums))
    grid = (call.num_heads, sums[0].shape[0])
    options = {"num_warps": 2, "num_stages": 1}  # for the registers of more threads
    return Launch(pooled_backward_kernel, grid, arguments, constants(call), options)


def constants(call: StemCall) -> dict[str, Any]:
    """What the kernels are compiled for."""
    head_dim = call.query_weight.shape[0] // call.num_heads
    return {
        "IN_CHANNELS": call.image.shape[1],
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(8, next_power_of_2(head_dim)),  # 8: the least depth of a product
        "BLOCK_SIZE": call.mixture.shape[-1],
        "BLOCKS": 4,
    }


def _arguments(call: StemCall, stem: Stem) -> dict[str, Any]:
    """The parameters as the kernels want them, each (heads, channels, ...), padded with zeros."""
    heads, (n, _, height, width) = call.num_heads, call.image.shape
    query_weight, key_weight = _by_head(stem.query_weight, heads), _by_head(stem.key_weight, heads)
    products = torch.einsum("hdi,hdj->hij", query_weight, key_weight) * _LOG2_E
    value_weight = stem.value_weight_at.unflatten(2, (heads, -1)).permute(2, 1, 3, 0)
    if stem.relative is None:
        relative = products.new_zeros(heads, 3, 16, 16)
    else:
        relative = stem.relative_weight_at.unflatten(2, (heads, -1)).permute(2, 1, 3, 0) * _LOG2_E
    return {
        "image": call.image,
        "image_strides": call.image.stride(),
        "num_images": n,
        "height": height,
        "width": width,
        "products": _pad(products, 3, 3),
        "relative": _pad(relative, 3, 16, 16),
        "value_weight": _pad(value_weight, 3, constants(call)["PADDED_DIM"], 16),
    }


def _by_head(weight: Tensor, heads: int) -> Tensor:
    return weight.unflatten(0, (heads, -1))


def _pad(x: Tensor, *sizes: int) -> Tensor:
    """``x`` with its last dimensions padded to these sizes, contiguous."""
    padding = [(0, size - old) for size, old in zip(sizes, x.shape[1:])]
    return F.pad(x, [n for pair in reversed(padding) for n in pair]).contiguous()


def new_partial_sums(call: StemCall, *shape: int) -> Tensor:
    """Room for the sums of the programs of a head."""
    n, _, height, width = call.image.shape
    block_size = call.mixture.shape[-1]
    across = cdiv(cdiv(width, block_size), constants(call)["BLOCKS"])
    tiles = n * cdiv(height, block_size) * across
    programs = min(tiles, cdiv(_SUMMING_PROGRAMS, call.num_heads))
    return call.image.new_empty(programs, *shape, dtype=torch.float32)
