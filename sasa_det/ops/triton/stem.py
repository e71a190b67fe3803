"""``stem_attention_pooled`` on CUDA, in Triton.

A program works on some blocks of one head at a time; what it reads of them is their pixels, what it
writes their maxima, and queries, keys, values and the output at full resolution exist in registers
only. Few channels make logits cheap without queries and keys, see folded_stem.py: the kernels add
up 4 + 4 numbers for the 16 keys of a query instead of computing each.

All is float32, in plain multiply-adds. Rounded for tensor cores, the positions of a block come so
close to each other that the maximum, and with it the gradient, would go to another one.

The backward finds the maxima once more, by the forward's kernel, and then goes through the queries
once: their gradients depend on where the maximum is. What the gradients of the parameters are
linear in, its programs sum up in registers, each for itself.
"""

from typing import Any

import torch
from torch import Tensor

from ..calls import StemCall, empty_pooled
from ..folded_stem import FoldedWeights, fold, unfold
from .launch import Launch, cdiv, next_power_of_2, on_device, refuses_tensor

# As in attention.py; more here, because the last ones to run have the GPU to themselves.
_SUMMING_PROGRAMS = 4096
# Threads of a program: it is one warp, which need not wait for others.
_THREADS = 32
# Of a head, that the forward works on at once: the values of a block must fit a thread's registers.
_CHANNELS = 8
_LOG2_E = 1.4426950408889634


def refuses(call: StemCall) -> str | None:
    reason = refuses_tensor(call.image)
    if reason is not None:
        return reason
    in_channels, block_size, head_dim = call.image.shape[1], _block_size(call), _head_dim(call)
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
    sums = new_output_sums(call)
    with on_device(call.image):
        forward_launch(call, fold(call), sums, maximum).run()
    total, square_total = sums.sum(dim=0)
    return pooled.copy_(maximum), total.clone(), square_total.clone()


def backward(
    call: StemCall, grad_maximum: Tensor, grad_total: Tensor, grad_square_total: Tensor
) -> list[Tensor]:
    weights = fold(call)
    positions, sums = new_positions(call), new_gradient_sums(call)
    with on_device(call.image):
        forward_launch(call, weights, positions=positions).run()
        grads = (grad_maximum, grad_total.contiguous(), 2 * grad_square_total)
        backward_launch(call, weights, positions, grads, sums).run()
        return _parameter_gradients(call, weights, sums.sum(dim=0))


def _parameter_gradients(call: StemCall, weights: FoldedWeights, sums: Tensor) -> list[Tensor]:
    """From the backward's sums (heads, rows of keys, numbers)."""
    sizes = [x[0].numel() for x in weights[:3]]
    *shared, of_values = sums.split([*sizes, sums.shape[2] - sum(sizes)], dim=2)
    of_values = of_values[:, : _block_size(call)].reshape_as(weights.value_weights)
    content, rows, cols = (x.sum(dim=1).view_as(weight) for x, weight in zip(shared, weights))
    return unfold(call, FoldedWeights(content, rows, cols, of_values))


def forward_launch(
    call: StemCall,
    weights: FoldedWeights,
    partial_sums: Tensor | None = None,
    maximum: Tensor | None = None,
    positions: Tensor | None = None,
) -> Launch:
    """Either for the sums and the maxima, or for the maxima's positions."""
    from .stem_kernels import pooled_forward_kernel

    arguments = _inputs(call, weights)
    arguments |= {"partial_sums": partial_sums, "maximum": maximum, "positions": positions}
    constants = _constants(call) | {"BLOCKS": _THREADS}
    grid = (_forward_programs(call), _summing_programs(call, _THREADS))
    options = {"num_warps": 1, "num_stages": 1}
    return Launch(pooled_forward_kernel, grid, arguments, constants, options)


def backward_launch(
    call: StemCall,
    weights: FoldedWeights,
    positions: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    sums: Tensor,
) -> Launch:
    """``grads`` are those of the maxima, of the sums, and twice those of the sums of squares."""
    from .stem_backward_kernel import pooled_backward_kernel

    names = ("grad_maximum", "grad_sum", "twice_grad_square_sum")
    arguments = _inputs(call, weights) | dict(zip(names, grads))
    arguments |= {"grad_maximum_strides": grads[0].stride(), "positions": positions, "sums": sums}
    key_rows = sums.shape[2]
    constants = _constants(call) | {"KEY_ROWS": key_rows, "BLOCKS": _THREADS // key_rows}
    grid = (call.num_heads, sums.shape[0])
    options = {"num_warps": 1, "num_stages": 1}
    return Launch(pooled_backward_kernel, grid, arguments, constants, options)


def _inputs(call: StemCall, weights: FoldedWeights) -> dict[str, Any]:
    """With logits in units of log 2."""
    n, _, height, width = call.image.shape
    return {
        "image": call.image,
        "image_strides": call.image.stride(),
        "num_images": n,
        "height": height,
        "width": width,
        "content": weights.content * _LOG2_E,
        "rel_rows": weights.rel_rows * _LOG2_E,
        "rel_cols": weights.rel_cols * _LOG2_E,
        "value_weights": weights.value_weights,
    }


def _constants(call: StemCall) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "IN_CHANNELS": call.image.shape[1],
        "HEAD_DIM": _head_dim(call),
        "CHANNELS": cdiv(_head_dim(call), cdiv(_head_dim(call), _CHANNELS)),
        "BLOCK_SIZE": _block_size(call),
    }


def new_output_sums(call: StemCall) -> Tensor:
    """(programs, 2, C): of the output, and of its squares."""
    programs, channels = _summing_programs(call, _THREADS), call.query_weight.shape[0]
    return call.image.new_empty((programs, 2, channels), dtype=torch.float32)


def new_positions(call: StemCall) -> Tensor:
    """(N, programs of a tile, blocks down, blocks across)"""
    shape = (call.image.shape[0], _forward_programs(call), *_blocks(call))
    return call.image.new_empty(shape, dtype=torch.int32)


def new_gradient_sums(call: StemCall) -> Tensor:
    """(programs, heads, rows of keys, numbers)"""
    block_size, in_channels = _block_size(call), call.image.shape[1]
    key_rows = next_power_of_2(block_size)
    numbers = in_channels + 2 * (2 * block_size - 1) + block_size * _head_dim(call)
    programs = _summing_programs(call, _THREADS // key_rows)
    shape = (programs, call.num_heads, key_rows, numbers * in_channels)
    return call.image.new_empty(shape, dtype=torch.float32)


def _forward_programs(call: StemCall) -> int:
    """For each tile of blocks: one for each head, or more where heads have many channels."""
    return call.num_heads * cdiv(_head_dim(call), _CHANNELS)


def _summing_programs(call: StemCall, tile: int) -> int:
    """Programs of a head, each of which works on tiles of so many blocks."""
    down, across = _blocks(call)
    tiles = cdiv(call.image.shape[0] * down * across, tile)
    return min(tiles, cdiv(_SUMMING_PROGRAMS, call.num_heads))


def _blocks(call: StemCall) -> tuple[int, int]:
    """Of an image, down and across."""
    height, width = call.image.shape[2:]
    return cdiv(height, _block_size(call)), cdiv(width, _block_size(call))


def _block_size(call: StemCall) -> int:
    return call.mixture.shape[-1]


def _head_dim(call: StemCall) -> int:
    return call.query_weight.shape[0] // call.num_heads
