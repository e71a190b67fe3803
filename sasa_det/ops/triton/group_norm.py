"""``group_norm_relu`` on CUDA, in Triton.

For maps whose channels are last, which torch's own group norm copies to the other format, in
float32 under autocast; the convolution behind it copies its output back. Here the map is read
twice and the output written once, both in the map's own dtype, all between them in float32.

Two kernels, without atomics: of one image each program of the first takes the statistics of some
positions, each program of the second puts all of them together. The backward is two as well.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..calls import GroupNormCall, Levels
from .launch import Launch, cdiv, next_power_of_2, on_device, refuses_tensor

# Numbers of a tile, 16 a thread: with four times as many, the backward runs out of registers.
_TILE = 2048
_MAX_CHANNELS = 2048
# Programs an image: each of them reads the sums of all the others.
_MAX_CHUNKS = 64


def refuses(call: GroupNormCall) -> str | None:
    x = call.x
    reason = refuses_tensor(x)
    if reason is not None:
        return reason
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "it serves maps whose channels are last"
    if x.shape[1] > _MAX_CHANNELS:
        return f"it serves maps of up to {_MAX_CHANNELS} channels, not {x.shape[1]}"
    if x[:1].numel() >= 2**31:
        return "it does not serve images of more than 2 ** 31 numbers"
    for parameter in (call.weight, call.bias):
        if parameter.shape != x.shape[1:2] or parameter.device != x.device:
            return "scale and shift must be one number each for a channel, where the map is"
        if not parameter.is_contiguous():
            return "it reads scale and shift one number after another"
    return None


def forward(call: GroupNormCall) -> tuple[Tensor, Tensor]:
    """The output, and the statistics: those of the call, if it has some."""
    x, of_maps = call.x, call.statistics
    output = torch.empty_like(x)
    with on_device(x):
        if of_maps is None:
            of_chunks = new_statistics(call, num_chunks(call))
            of_maps = new_statistics(call, len(_maps(call)))
            statistics_launch(call, of_chunks).run()
            forward_launch(call, of_chunks, output, of_maps).run()
        else:
            forward_launch(call, of_maps, output, of_maps).run()
    return output, of_maps


def backward(
    call: GroupNormCall, grad_output: Tensor, grad_residual: Tensor | None = None
) -> list[Tensor]:
    """The gradient of x, and those of weight and bias in one tensor, in float32.

    ``grad_residual`` is added to the first: what else x has a gradient from.
    """
    x, chunks = call.x, num_chunks(call)
    grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    if grad_residual is not None:
        grad_residual = grad_residual.contiguous(memory_format=torch.channels_last)
    grad_input = torch.empty_like(x)
    of_channels = x.new_empty(x.shape[0], chunks, 2, x.shape[1], dtype=torch.float32)
    of_groups = new_statistics(call, chunks)
    with on_device(x):
        gradient_sums_launch(call, grad_output, of_channels, of_groups).run()
        input_gradient_launch(call, grad_output, of_groups, grad_residual, grad_input).run()
    return [grad_input, of_channels.sum(dim=(0, 1))]


def statistics_launch(call: GroupNormCall, statistics: Tensor) -> Launch:
    from .group_norm_kernels import statistics_kernel

    return _launch(statistics_kernel, call, statistics=statistics)


def forward_launch(
    call: GroupNormCall, statistics: Tensor, output: Tensor, of_maps: Tensor
) -> Launch:
    """From the call's statistics; if it has none, from those of chunks, and writes ``of_maps``."""
    from .group_norm_kernels import forward_kernel

    of_chunks = call.statistics is None
    rows = most_chunks(call) if of_chunks else 1
    launch = _launch(
        forward_kernel, call, statistics=statistics, output=output, statistics_of_map=of_maps
    )
    launch.constants.update(OF_CHUNKS=of_chunks, CHUNKS_PAD=next_power_of_2(rows))
    return launch


def gradient_sums_launch(
    call: GroupNormCall, grad_output: Tensor, channel_sums: Tensor, group_sums: Tensor
) -> Launch:
    from .group_norm_kernels import gradient_sums_kernel

    sums = {"channel_sums": channel_sums, "group_sums": group_sums}
    return _launch(gradient_sums_kernel, call, grad_output=grad_output, **sums)


def input_gradient_launch(
    call: GroupNormCall,
    grad_output: Tensor,
    group_sums: Tensor,
    grad_residual: Tensor | None,
    grad_input: Tensor,
) -> Launch:
    from .group_norm_kernels import input_gradient_kernel

    tensors = {"grad_output": grad_output, "group_sums": group_sums, "grad_input": grad_input}
    launch = _launch(input_gradient_kernel, call, grad_residual=grad_residual, **tensors)
    launch.constants["CHUNKS_PAD"] = next_power_of_2(most_chunks(call))
    return launch


def _launch(kernel: Any, call: GroupNormCall, **tensors: Tensor | None) -> Launch:
    """With these tensors, and with whatever any of the kernels takes."""
    n, channels, height, width = call.x.shape
    dim, maps = channels // call.num_groups, _maps(call)
    arguments = {
        "x": call.x,
        "weight": call.weight,
        "bias": call.bias,
        "eps": call.eps,
        "statistics": call.statistics,
        "levels": _level_table(maps, call.x.device),
        "all_positions": height * width,
        "positions": maps[0].positions,
        "tiles": maps[0].tiles,
        "chunks": maps[0].chunks,
        **tensors,
    }
    constants = {
        "LEVELS": len(maps),
        "GROUPS": call.num_groups,
        "DIM": dim,
        "BLOCK": maps[0].block,
        "GROUPS_PAD": next_power_of_2(call.num_groups),
        "DIM_PAD": next_power_of_2(dim),
    }
    # Not fused, products and sums are rounded alike in all threads that hold the same statistics.
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
    return Launch(kernel, (num_chunks(call), n), arguments, constants, options)


class Tiling(NamedTuple):
    """How the positions of a map are shared out: ``chunks`` programs, each with so many ``tiles``
    of ``block`` positions, the last one perhaps with fewer."""

    positions: int
    block: int
    tiles: int
    chunks: int


def _maps(call: GroupNormCall) -> tuple[Tiling, ...]:
    """Of one image."""
    _, channels, height, width = call.x.shape
    levels = call.levels or ((height, width),)
    return _tilings(levels, channels, call.num_groups, _MAX_CHUNKS)


@functools.lru_cache(maxsize=1024)
def _tilings(
    levels: Levels, channels: int, num_groups: int, most_chunks: int
) -> tuple[Tiling, ...]:
    numbers = next_power_of_2(num_groups) * next_power_of_2(channels // num_groups)
    block = max(1, _TILE // numbers)
    tilings = []
    for height, width in levels:
        all_tiles = cdiv(height * width, block)
        tiles = cdiv(all_tiles, most_chunks)
        tilings.append(Tiling(height * width, block, tiles, cdiv(all_tiles, tiles)))
    return tuple(tilings)


@functools.cache  # without limit: a captured CUDA graph may still read any of them
def _level_table(maps: tuple[Tiling, ...], device: torch.device) -> Tensor | None:
    """As ``group_norm_kernels.map_of`` reads it."""
    if len(maps) == 1:
        return None
    rows, chunks, positions = [], 0, 0
    for tiling in maps:
        rows.append((chunks, positions, tiling.positions, tiling.tiles, tiling.chunks))
        chunks += tiling.chunks
        positions += tiling.positions
    return torch.tensor(rows, dtype=torch.int32, device=device)


def num_chunks(call: GroupNormCall) -> int:
    """Programs an image."""
    return sum(tiling.chunks for tiling in _maps(call))


def most_chunks(call: GroupNormCall) -> int:
    """Programs a map."""
    return max(tiling.chunks for tiling in _maps(call))


def new_statistics(call: GroupNormCall, rows: int) -> Tensor:
    """Two numbers for each group of a map, or of each of its chunks."""
    shape = (call.x.shape[0], rows, 2, call.num_groups)
    return call.x.new_empty(shape, dtype=torch.float32)
