"""How the kernels of attention cut maps into tiles, and how many threads take one."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..calls import AttentionCall, Levels
from .launch import cdiv, next_power_of_2


def tile_of(call: AttentionCall) -> dict[str, Any]:
    """What the kernels are compiled for: of the call, and BLOCK_H, BLOCK_W and more of a tile."""
    levels = 1 if call.levels is None else len(call.levels)
    precision = float32_precision() if call.query.dtype == torch.float32 else "ieee"
    relative = call.rel_rows is not None
    return _tile_of(
        call.query.shape[1], call.num_heads, call.kernel_size, relative, levels, precision
    )


@functools.cache
def _tile_of(
    channels: int, num_heads: int, kernel_size: int, relative: bool, levels: int, precision: str
) -> dict[str, Any]:
    head_dim = channels // num_heads
    # With 16 channels the kernels for narrow heads would take longer than the others, and with
    # larger windows they run out of registers.
    narrow = head_dim in (2, 4, 8) and kernel_size in (3, 5, 7)
    tile = {
        "NUM_HEADS": num_heads,
        "HEAD_DIM": head_dim,
        "PADDED_DIM": max(16, next_power_of_2(head_dim)),  # 16: the least depth of a product
        "KERNEL_SIZE": kernel_size,
        "KERNEL_PAD": max(8, next_power_of_2(kernel_size)),  # a table of 16 rows at least
        "RELATIVE": relative,
        "LEVELS": levels,
        "PRECISION": precision,
        **(_narrow_tile(num_heads) if narrow else _tile(kernel_size)),
    }
    if not _fits_a_warp(tile):  # nor, with numbers of float32, tensor cores
        tile["PRECISION"] = "ieee"
    return tile


def is_narrow(tile: dict[str, Any]) -> bool:
    """Whether it is for the kernels of heads of few channels, without tensor cores."""
    return "STRIP" in tile


def _tile(kernel_size: int) -> dict[str, Any]:
    """32 queries of a head, chosen by their times on an H200 at k = 7.

    With 2 x 8 of them in a tile instead of 4 x 8 fewer logits are of no use, but keys are loaded 8
    times instead of 5; with 8 x 8 it is the other way round. Both were slower.
    """
    block_w = max(8, next_power_of_2(kernel_size - 1))
    halo_w = 2 * block_w  # room for block_w + kernel_size - 1
    return {
        "HEADS": 1,
        "BLOCK_H": 32 // block_w,
        "BLOCK_W": block_w,
        "HALO_W": halo_w,
        "CHUNK_H": max(1, 32 // halo_w),
    }


def _narrow_tile(num_heads: int) -> dict[str, Any]:
    """128 threads with two positions each, chosen by their times on an H100 at k = 7."""
    heads = math.gcd(num_heads, 8)
    return {"HEADS": heads, "BLOCK_H": 4, "BLOCK_W": 64 // heads, "STRIP": 2}


def options(
    tile: dict[str, Any], dtype: torch.dtype, narrow_registers: int = 168
) -> dict[str, int]:
    """What the compiler is told for such a tile."""
    if is_narrow(tile):
        return {"num_warps": 4, "num_stages": 1, "maxnreg": narrow_registers}
    # One warp, where its registers suffice, or nearly so: keys go from shared memory to the tensor
    # cores once for all queries of a tile.
    if dtype == torch.float32:
        return {"num_warps": 1 if _fits_a_warp(tile) else 4, "num_stages": 2}
    return {"num_warps": 1 if _fits_a_warp(tile) else 2, "num_stages": 3}


def _fits_a_warp(tile: dict[str, Any]) -> bool:
    return tile["PADDED_DIM"] <= 32 and tile["KERNEL_PAD"] <= 8


def float32_precision() -> str:
    """Of products in float32: as torch multiplies matrices on a GPU.

    Tensor cores have no float32, but tf32, with ten bits of mantissa. Three of its products come as
    near to one of float32 as that is to the exact one.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # its older name may not be asked once this one was set
        allowed = matmul.fp32_precision == "tf32"
    else:
        allowed = matmul.allow_tf32
    return "tf32" if allowed else "tf32x3"


def num_tiles(call: AttentionCall, tile: dict[str, Any]) -> int:
    """Of an image."""
    levels = call.levels or (tuple(call.query.shape[2:]),)
    return sum(cdiv(h, tile["BLOCK_H"]) * cdiv(w, tile["BLOCK_W"]) for h, w in levels)


def tiles_grid(call: AttentionCall, tile: dict[str, Any]) -> tuple[int, int]:
    """A program for each tile of each head, or of as many as it takes at once, of each image."""
    return call.num_heads // tile["HEADS"] * num_tiles(call, tile), call.query.shape[0]


def level_table(call: AttentionCall, tile: dict[str, Any]) -> Tensor | None:
    """As ``kernels.level_of`` reads it."""
    if call.levels is None:
        return None
    return _level_table(call.levels, tile["BLOCK_H"], tile["BLOCK_W"], call.query.device)


@functools.cache  # without limit: a captured CUDA graph may still read any of them
def _level_table(levels: Levels, block_h: int, block_w: int, device: torch.device) -> Tensor:
    rows, tiles, positions = [], 0, 0
    for height, width in levels:
        rows.append((tiles, positions, height, width))
        tiles += cdiv(height, block_h) * cdiv(width, block_w)
        positions += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device)
