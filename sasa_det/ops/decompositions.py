"""The operators in terms of torch's own, for programs that run without this package.

An exported program shows each operator as one node. These decompositions turn such a node into
standard ones, about a hundred whatever the size of the window, for any batch, height and width:

    program.run_decompositions(decompositions())

Queries are taken in blocks, each with the keys that its windows reach, its halo. A query is
extended by a row logit for each row of the halo and by a column logit for each column, and a key by
the one-hot of its row and of its column. Their product then is q . k + q . r inside the window, and
far below it elsewhere, where the row or the column logit is a large negative number. Rows are told
apart modulo the side of the halo, so that a key has the same extension in every halo.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from . import registration  # noqa: F401  (the operators exist once it is imported)
from .calls import AttentionCall, StemCall, compute_dtype

# The side of a block. Of larger ones more logits are masked, of smaller ones keys are copied more;
# this is the fastest of 4 and 8, by little, and has half the logits of 8.
BLOCK_SIZE = 4
# Weights outside the window are exp(-50) of that of the query's own position, or less: nothing, in
# the rounding of float64 too. Smaller ones would be denormal, with which processors are slow.
_FLOOR = 50.0


def decompositions() -> dict[Any, Callable]:
    """What ``torch.export.ExportedProgram.run_decompositions`` takes; forward operators only."""
    return {
        torch.ops.sasa_det.local_attention.default: _local_attention,
        torch.ops.sasa_det.stem_attention.default: _stem_attention,
        torch.ops.sasa_det.stem_attention_pooled.default: _stem_attention_pooled,
    }


class _Axis(NamedTuple):
    """Rows or columns of a grid of positions (A, B), as tensors that broadcast to (A, B, halo).

    Attributes:
        offset (Tensor): index of the embedding by which a position meets the keys of each slot of
            the halo; the number of embeddings for slots outside its window.
        slot (Tensor): one-hot, the slot of a position as a key.
    """

    offset: Tensor
    slot: Tensor


def _local_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*arguments)
    n, channels, height, width = call.query.shape
    dtype, device = compute_dtype(call.query.dtype), call.query.device
    query, key, value = (
        x.to(dtype).reshape(n, call.num_heads, -1, height * width).transpose(2, 3)
        for x in call[:3]
    )
    radius = call.kernel_size // 2
    halo = BLOCK_SIZE + 2 * radius
    slots = torch.arange(halo, device=device)
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, cols = (
        _Axis(((slots - at + radius) % halo).clamp(max=call.kernel_size), at % halo == slots)
        for at in (y[:, None, None], x[:, None])
    )
    embeddings = (call.rel_rows, call.rel_cols)
    query, key, shift = _extend(query, key, (height, width), (rows, cols), embeddings, radius)
    starts = (_block_starts(size, BLOCK_SIZE, device) for size in (height, width))
    key_rows, key_cols = (start + slots - radius for start in starts)
    inside = _outer(torch.logical_and, *_inside(key_rows, height, key_cols, width))
    keys = _outer(torch.add, key_rows * width, key_cols)
    # A zero key stands for those outside the map, and any value: its weight is nothing.
    key = F.pad(key, (0, 0, 0, 1)).index_select(2, torch.where(inside, keys, height * width))
    value = value.index_select(2, torch.where(inside, keys, 0))
    output, logsumexp = _attend(
        query.index_select(2, _in_blocks(height, width, BLOCK_SIZE, device)), key, value, halo**2
    )
    back = _in_map(height, width, BLOCK_SIZE, device)
    output = output.index_select(2, back).transpose(2, 3)
    output = output.reshape(n, channels, height, width).to(call.query.dtype)
    logsumexp = logsumexp.index_select(2, back) + shift
    return output, logsumexp.unflatten(2, (height, width))


def _stem_attention(*arguments: Any) -> Tensor:
    call = StemCall(*arguments)
    n, _, height, width = call.image.shape
    output = _stem_in_map(call, _stem_in_blocks(call)).transpose(2, 3)
    return output.reshape(n, -1, height, width).to(call.image.dtype)


def _stem_attention_pooled(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    call = StemCall(*arguments)
    n, _, height, width = call.image.shape
    block_size = call.mixture.shape[-1]
    output = _stem_in_blocks(call)
    inside = _inside_image(call)
    blocks = output if inside is None else torch.where(inside[:, None], output, float("-inf"))
    maximum = blocks.unflatten(2, (-1, block_size**2)).amax(dim=3).transpose(2, 3)
    maximum = maximum.reshape(n, -1, _num_blocks(height, block_size), _num_blocks(width, block_size))
    output = _stem_in_map(call, output)
    total, square_total = (x.sum(dim=(0, 2)).flatten() for x in (output, output.square()))
    return maximum.to(call.image.dtype), total, square_total


def _stem_in_blocks(call: StemCall) -> Tensor:
    """The output, (N, heads, blocks * positions of a block, d)."""
    image = call.image.to(compute_dtype(call.image.dtype))
    _, _, height, width = image.shape
    block_size = call.mixture.shape[-1]
    area = block_size**2
    positions = _in_blocks(height, width, block_size, image.device)
    pixels = image.flatten(2).transpose(1, 2).index_select(1, positions).unsqueeze(1)

    def project(pixels: Tensor, weight: Tensor) -> Tensor:
        """(N, 1, L, channels) to (N, heads, L, d)."""
        weight = weight.to(image.dtype).unflatten(0, (call.num_heads, -1))
        return pixels @ weight.transpose(1, 2)

    query, key = project(pixels, call.query_weight), project(pixels, call.key_weight)
    # The mixture of values as one of pixels: each is multiplied by what its place in the block has
    # of each projection.
    mixture = call.mixture.to(image.dtype).flatten(1).t()[:, :, None]
    mixed = (pixels.unflatten(2, (-1, area)).unsqueeze(4) * mixture).flatten(4).flatten(2, 3)
    value = project(mixed, call.value_weights.transpose(0, 1).flatten(1))
    slots = torch.arange(block_size, device=image.device)
    place = torch.arange(area, device=image.device)[:, None]
    rows, cols = (
        _Axis(slots - at + block_size - 1, at == slots)
        for at in (place // block_size, place % block_size)
    )
    grid, embeddings = (positions.shape[0] // area, area), (call.rel_rows, call.rel_cols)
    query, key, _ = _extend(query, key, grid, (rows, cols), embeddings, block_size - 1)
    inside = _inside_image(call)
    if inside is not None:
        key = key * inside[:, None]  # a zero key stands for those outside the image
    return _attend(query, key, value, area, area)[0]


def _inside_image(call: StemCall) -> Tensor | None:
    """Which positions of the blocks are inside the image; None if the blocks divide it."""
    height, width = call.image.shape[2:]
    block_size = call.mixture.shape[-1]
    # Not to be asked of a size that an exporter leaves open: it would make it one that divides.
    if all(statically_known_true(size % block_size == 0) for size in (height, width)):
        return None
    device = call.image.device
    within = torch.arange(block_size, device=device)
    rows, cols = (_block_starts(size, block_size, device) + within for size in (height, width))
    return _outer(torch.logical_and, *_inside(rows, height, cols, width))


def _stem_in_map(call: StemCall, blocks: Tensor) -> Tensor:
    height, width = call.image.shape[2:]
    back = _in_map(height, width, call.mixture.shape[-1], blocks.device)
    return blocks.index_select(2, back)


def _extend(
    query: Tensor,
    key: Tensor,
    grid: tuple[int, int],
    axes: tuple[_Axis, _Axis],
    embeddings: tuple[Tensor | None, Tensor | None],
    centre: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (N, heads, L, d) with their extensions, (N, heads, L, d + 2 * halo).

    Their product is the logit less the shift (N, heads, L), which puts the logit of the query's
    own position, index ``centre`` of both embeddings, ``_FLOOR`` above zero.
    """
    n, heads, length, head_dim = query.shape
    dtype, device = query.dtype, query.device
    shift = (query * key).sum(dim=3, keepdim=True) - _FLOOR
    outside = torch.full_like(shift, torch.finfo(dtype).min / 4)
    if embeddings[0] is None:
        tables = [torch.zeros_like(shift).expand(-1, -1, -1, 2 * centre + 1)] * 2
    else:
        halves = query.split(head_dim // 2, dim=3)
        tables = [half @ x.to(dtype).transpose(1, 2) for half, x in zip(halves, embeddings)]
        shift = shift + tables[0][..., centre, None] + tables[1][..., centre, None]
    tables[0] = tables[0] - shift
    width = 2 * centre + 2
    start = (width * torch.arange(length, device=device)).view(*grid, 1)
    queries, keys = [query], [key]
    for axis, table in zip(axes, tables):
        table = torch.cat([table, outside], dim=3).flatten(2)
        logits = table.index_select(2, (start + axis.offset).flatten())
        queries.append(logits.unflatten(2, (length, -1)))
        slot = axis.slot.to(dtype).expand(*grid, -1).reshape(length, -1)
        keys.append(slot.expand(n, heads, -1, -1))
    return torch.cat(queries, dim=3), torch.cat(keys, dim=3), shift.squeeze(3)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, num_keys: int, num_queries: int = BLOCK_SIZE**2
) -> tuple[Tensor, Tensor]:
    """Output (N, heads, L, d) and log-sum-exp (N, heads, L); queries and keys are extended."""
    query = query.unflatten(2, (-1, num_queries))
    key, value = (x.unflatten(2, (-1, num_keys)) for x in (key, value))
    logits = (query @ key.transpose(3, 4)).relu()
    output = logits.softmax(dim=4) @ value
    return output.flatten(2, 3), logits.logsumexp(dim=4).flatten(2)


def _outer(function: Callable, rows: Tensor, cols: Tensor) -> Tensor:
    """Of (blocks, rows) and (blocks, columns): flat, block by block."""
    return function(rows[:, None, :, None], cols[:, None]).flatten()


def _inside(rows: Tensor, height: int, cols: Tensor, width: int) -> tuple[Tensor, Tensor]:
    return (rows >= 0) & (rows < height), (cols >= 0) & (cols < width)


def _num_blocks(size: int, block_size: int) -> int:
    # Not -(-size // block_size): a division of ONNX rounds towards zero.
    return (size + block_size - 1) // block_size


def _block_starts(size: int, block_size: int, device: torch.device) -> Tensor:
    return block_size * torch.arange(_num_blocks(size, block_size), device=device)[:, None]


def _in_blocks(height: int, width: int, block_size: int, device: torch.device) -> Tensor:
    """Which position of the map each position of the blocks is; past the border, the last."""
    within = torch.arange(block_size, device=device)
    rows = (_block_starts(height, block_size, device) + within).clamp(max=height - 1)
    cols = (_block_starts(width, block_size, device) + within).clamp(max=width - 1)
    return _outer(torch.add, rows * width, cols)


def _in_map(height: int, width: int, block_size: int, device: torch.device) -> Tensor:
    """Which position of the blocks each position of the map is: the inverse."""
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    # Truncated, which is one node where a floor division is eight.
    block_row, block_col = (torch.div(at, block_size, rounding_mode="trunc") for at in (y, x))
    block = block_row * _num_blocks(width, block_size) + block_col
    return ((block * block_size + y % block_size) * block_size + x % block_size).flatten()
