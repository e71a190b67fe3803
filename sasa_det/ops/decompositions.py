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


class Positions(NamedTuple):
    """Which positions of a map meet which: indices (int64) that depend on its size alone.

    L counts the positions of the map, P is the side of a halo.

    Attributes:
        row_logits, col_logits (Tensor[L * P]): where in a flat table (L, kernel_size + 1) the
            logits of each position for the slots of a halo are; the last is that of no key.
        slots (Tensor[L, 2 * P]): one-hot twice, of a position's row and column modulo P; float32.
        queries (Tensor[blocks * area]): position in the map of each query; past the border, any.
        keys (Tensor[blocks * P * P]): of each key; L for those outside the map.
        values (Tensor[blocks * P * P]): the same, but any position for those.
        back (Tensor[L]): where each position is among the queries.
    """

    row_logits: Tensor
    col_logits: Tensor
    slots: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    back: Tensor


def window_positions(y: Tensor, x: Tensor, kernel_size: int) -> Positions:
    """For windows on a map with the rows ``y`` and the columns ``x``, (H,) and (W,) from zero."""
    device, height, width = y.device, y.shape[0], x.shape[0]
    radius = kernel_size // 2
    halo = BLOCK_SIZE + 2 * radius
    slots = torch.arange(halo, device=device)
    y, x = y[:, None, None], x[:, None]
    table = (y * width + x) * (kernel_size + 1)
    rows, cols = (at - radius for at in _by_block(height, width, BLOCK_SIZE, halo, device))
    inside = _inside(rows, height) & _inside(cols, width)
    keys = rows * width + cols
    row_logits, col_logits = ((table + _offsets(at, radius, slots)).flatten() for at in (y, x))
    return Positions(
        row_logits,
        col_logits,
        _one_hot([at % halo == slots for at in (y, x)], (height, width)),
        _in_blocks(height, width, BLOCK_SIZE, device),
        torch.where(inside, keys, height * width),
        torch.where(inside, keys, 0),
        _in_map(height, width, BLOCK_SIZE, device),
    )


def _offsets(at: Tensor, radius: int, slots: Tensor) -> Tensor:
    """Index of the embedding by which a row or column meets each slot; 2 * radius + 1 for none."""
    return ((slots - at + radius) % slots.shape[0]).clamp(max=2 * radius + 1)


def _one_hot(slots: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """(L, 2 * P) of two that broadcast to (*grid, P)."""
    one_hot = [x.to(torch.float32).expand(*grid, -1).flatten(0, 1) for x in slots]
    return torch.cat(one_hot, dim=1)


def attend_in_windows(call: AttentionCall, positions: Positions) -> tuple[Tensor, Tensor]:
    """What the operator returns, given the positions for its map and its window."""
    n, channels, height, width = call.query.shape
    dtype = compute_dtype(call.query.dtype)
    query, key, value = (
        x.to(dtype).reshape(n, call.num_heads, -1, height * width).transpose(2, 3) for x in call[:3]
    )
    embeddings = (call.rel_rows, call.rel_cols)
    query, key, shift = _extend(query, key, positions, embeddings, call.kernel_size // 2)
    # A zero key stands for those outside the map, and any value: its weight is nothing.
    output, logsumexp = _attend(
        query.index_select(2, positions.queries),
        F.pad(key, (0, 0, 0, 1)).index_select(2, positions.keys),
        value.index_select(2, positions.values),
        num_queries=BLOCK_SIZE**2,
        num_keys=(BLOCK_SIZE + 2 * (call.kernel_size // 2)) ** 2,
    )
    output = output.index_select(2, positions.back).transpose(2, 3)
    output = output.reshape(n, channels, height, width).to(call.query.dtype)
    logsumexp = logsumexp.index_select(2, positions.back) + shift
    return output, logsumexp.unflatten(2, (height, width))


def _local_attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = AttentionCall(*arguments)
    y, x = (torch.arange(size, device=call.query.device) for size in call.query.shape[2:])
    return attend_in_windows(call, window_positions(y, x, call.kernel_size))


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
    maximum = maximum.reshape(
        n, -1, _num_blocks(height, block_size), _num_blocks(width, block_size)
    )
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
    query, key, _ = _extend(
        query,
        key,
        _places(positions.shape[0] // area, block_size, image.device),
        (call.rel_rows, call.rel_cols),
        block_size - 1,
    )
    inside = _inside_image(call)
    if inside is not None:
        key = key * inside[:, None]  # a zero key stands for those outside the image
    return _attend(query, key, value, num_queries=area, num_keys=area)[0]


def _places(num_blocks: int, block_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """The first three of :class:`Positions`, for positions block by block."""
    slots = torch.arange(block_size, device=device)
    place = torch.arange(block_size**2, device=device)[:, None]
    axes = _div(place, block_size), place % block_size
    grid = (num_blocks, block_size**2)
    table = 2 * block_size * torch.arange(num_blocks * block_size**2, device=device).view(*grid, 1)
    indices = ((table + slots - at + block_size - 1).flatten() for at in axes)
    return *indices, _one_hot([at == slots for at in axes], grid)


def _inside_image(call: StemCall) -> Tensor | None:
    """Which positions of the blocks are inside the image; None if the blocks divide it."""
    height, width = call.image.shape[2:]
    block_size = call.mixture.shape[-1]
    # Not to be asked of a size that an exporter leaves open: it would make it one that divides.
    if all(statically_known_true(size % block_size == 0) for size in (height, width)):
        return None
    rows, cols = _by_block(height, width, block_size, block_size, call.image.device)
    return _inside(rows, height) & _inside(cols, width)


def _stem_in_map(call: StemCall, blocks: Tensor) -> Tensor:
    height, width = call.image.shape[2:]
    back = _in_map(height, width, call.mixture.shape[-1], blocks.device)
    return blocks.index_select(2, back)


def _extend(
    query: Tensor,
    key: Tensor,
    positions: tuple[Tensor, ...],
    embeddings: tuple[Tensor | None, Tensor | None],
    centre: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys (N, heads, L, d) with their extensions, (N, heads, L, d + 2 * P).

    Their product is the logit less the shift (N, heads, L), which puts the logit of the query's
    own position, index ``centre`` of both embeddings, ``_FLOOR`` above zero.
    """
    row_logits, col_logits, slots, *_ = positions
    n, heads, length, head_dim = query.shape
    dtype = query.dtype
    shift = (query * key).sum(dim=3, keepdim=True) - _FLOOR
    no_key = torch.full_like(shift, torch.finfo(dtype).min / 4)
    tables = [torch.zeros_like(shift).expand(-1, -1, -1, 2 * centre + 1)] * 2
    rel_rows, rel_cols = embeddings
    if rel_rows is not None and rel_cols is not None:
        halves = query.split(head_dim // 2, dim=3)
        tables = [
            half @ x.to(dtype).transpose(1, 2) for half, x in zip(halves, (rel_rows, rel_cols))
        ]
        shift = shift + tables[0][..., centre, None] + tables[1][..., centre, None]
    tables[0] = tables[0] - shift
    extensions = [
        torch.cat([table, no_key], dim=3).flatten(2).index_select(2, index)
        for table, index in zip(tables, (row_logits, col_logits))
    ]
    extensions = [x.unflatten(2, (length, -1)) for x in extensions]
    extended_key = torch.cat([key, slots.to(dtype).expand(n, heads, -1, -1)], dim=3)
    return torch.cat([query, *extensions], dim=3), extended_key, shift.squeeze(3)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, *, num_queries: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Output (N, heads, L, d) and log-sum-exp (N, heads, L); queries and keys are extended."""
    grid = (*value.shape[:2], -1)
    # Images, heads and blocks in one dimension, by way of the flat one: an exporter whose example
    # has one block takes the number of blocks for a constant, where it stands by itself.
    query = query.flatten(0, 2).unflatten(0, (-1, num_queries))
    key, value = (x.flatten(0, 2).unflatten(0, (-1, num_keys)) for x in (key, value))
    logits = (query @ key.transpose(1, 2)).relu()
    output = (logits.softmax(dim=2) @ value).flatten(0, 1).unflatten(0, grid)
    return output, logits.logsumexp(dim=2).flatten().unflatten(0, grid)


def _inside(at: Tensor, size: int) -> Tensor:
    return (at >= 0) & (at < size)


def _num_blocks(size: int, block_size: int) -> int:
    # Not -(-size // block_size): a division of ONNX rounds towards zero.
    return (size + block_size - 1) // block_size


def _by_block(
    height: int, width: int, block_size: int, side: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows and columns of ``side * side`` positions for each block, from its first one on: flat.

    Computed from one index: an exporter takes the number of blocks for a constant, where it is one
    in the example and a side of a tensor.
    """
    across = _num_blocks(width, block_size)
    number = _num_blocks(height, block_size) * across
    index = torch.arange(number * side**2, device=device)
    block, place = _div(index, side**2), index % side**2
    block_row = _div(block, across)
    block_col = block - block_row * across  # ONNX has no remainder by a size
    return block_row * block_size + _div(place, side), block_col * block_size + place % side


def _div(index: Tensor, by: int) -> Tensor:
    # Truncated, which is one node where a floor division is eight.
    return torch.div(index, by, rounding_mode="trunc")


def _in_blocks(height: int, width: int, block_size: int, device: torch.device) -> Tensor:
    """Which position of the map each position of the blocks is; past the border, the last."""
    rows, cols = _by_block(height, width, block_size, block_size, device)
    return rows.clamp(max=height - 1) * width + cols.clamp(max=width - 1)


def _in_map(height: int, width: int, block_size: int, device: torch.device) -> Tensor:
    """Which position of the blocks each position of the map is: the inverse."""
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)
    block_row, block_col = _div(y, block_size), _div(x, block_size)
    block = block_row * _num_blocks(width, block_size) + block_col
    return ((block * block_size + y % block_size) * block_size + x % block_size).flatten()
