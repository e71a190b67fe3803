"""The forward kernel of ``local_attention``, and what the backward's kernels share with it.

Maps are (N, positions, C), as channels_last has them. In shapes M stands for the positions of a
tile, P for those of a chunk of its halo, D for PADDED_DIM, T for the 2 * KERNEL_PAD rows of a
head's table of embeddings.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

from .launch import interpreted

INTERPRETED = tl.constexpr(interpreted())
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Stands for the maximum of nothing: finite, because the difference of two infinities is NaN.
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    if INTERPRETED:  # it multiplies the bit patterns of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def convert(x, dtype: tl.constexpr):
    """``x`` (float32) rounded to ``dtype``."""
    if INTERPRETED and dtype == tl.bfloat16:  # it does not round bits that do not fit
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def log2(x):
    if INTERPRETED:
        return tl.log2(x)
    return libdevice.fast_log2f(x)  # one instruction; the other one also knows subnormal numbers


@triton.jit
def find_level(index, levels, COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """The last of these rows whose first number is not beyond the index."""
    level = 0
    for i in tl.static_range(1, LEVELS):
        level += (index >= tl.load(levels + COLUMNS * i)).to(tl.int32)
    return level


@triton.jit
def level_of(index, levels, height, width, LEVELS: tl.constexpr):
    """Where a tile lies: its index within its map, the map's first position, height and width.

    Several maps of an image, one behind the other, have ``levels``: of each its first tile, its
    first position, its height and its width.
    """
    start = 0
    if LEVELS > 1:
        levels += 4 * find_level(index, levels, 4, LEVELS)
        index -= tl.load(levels)
        start, height, width = tl.load(levels + 1), tl.load(levels + 2), tl.load(levels + 3)
    return index, start, height, width


@triton.jit
def corner_of(index, width, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Top row and left column of a tile of a map."""
    across = tl.cdiv(width, BLOCK_W)
    return index // across * BLOCK_H, index % across * BLOCK_W


@triton.jit
def clamp(x, size):
    """The nearest of the positions 0 to size - 1.

    What lies outside the map is read from its border, and has no weight: that costs less than a
    mask for each number.
    """
    return tl.minimum(tl.maximum(x, 0), size - 1)


@triton.jit
def within(x, size):
    """Whether these are positions 0 to size - 1."""
    return x.to(tl.uint32) < size.to(tl.uint32)  # negative ones are large unsigned numbers


@triton.jit
def base_of(pointer, strides, n, start, head, HEAD_DIM: tl.constexpr):
    """Where a head begins in a map: (N, positions, C), with strides of the first two."""
    return pointer + n.to(tl.int64) * strides[0] + start * strides[1] + head * HEAD_DIM


@triton.jit
def offsets_of(strides, rows, cols, width, PADDED_DIM: tl.constexpr):
    """(positions, D) offsets from ``base_of``."""
    channels = tl.arange(0, PADDED_DIM)[None]
    # In this order, because loops walk over rows, and what does not change is computed once.
    return (rows * (width * strides[1]))[:, None] + ((cols * strides[1])[:, None] + channels)


@triton.jit
def load(base, offsets, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """(positions, D) of a head, with zeros as the padding of its channels."""
    if HEAD_DIM == PADDED_DIM:
        return tl.load(base + offsets)
    return tl.load(base + offsets, (tl.arange(0, PADDED_DIM) < HEAD_DIM)[None], 0.0)


@triton.jit
def store(base, offsets, x, inside, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Writes (positions, D) of a head where they are inside the map."""
    mask = inside[:, None]
    if HEAD_DIM != PADDED_DIM:
        mask = mask & (tl.arange(0, PADDED_DIM) < HEAD_DIM)[None]
    tl.store(base + offsets, convert(x, base.dtype.element_ty), mask)


@triton.jit
def parts_of_table(
    offset,
    channel,
    HEAD_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
):
    """Where the table of ``load_table`` has row embeddings, and where column embeddings."""
    HALF: tl.constexpr = HEAD_DIM // 2
    is_row = (offset < KERNEL_SIZE) & (channel < HALF)
    is_col = (offset >= KERNEL_PAD) & (offset < KERNEL_PAD + KERNEL_SIZE)
    return is_row, is_col & (channel >= HALF) & (channel < HEAD_DIM)


@triton.jit
def load_table(
    rel_rows,
    rel_cols,
    head,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
    dtype: tl.constexpr,
):
    """(T, D): the row embeddings in the first half of the channels, below them the column
    embeddings in the second half. One product with it gives all factors of q . r."""
    HALF: tl.constexpr = HEAD_DIM // 2
    offset = tl.arange(0, 2 * KERNEL_PAD)[:, None]
    channel = tl.arange(0, PADDED_DIM)[None]
    is_row, is_col = parts_of_table(offset, channel, HEAD_DIM, KERNEL_SIZE, KERNEL_PAD)
    start = head * KERNEL_SIZE * HALF
    rows = tl.load(rel_rows + start + offset * HALF + channel, mask=is_row, other=0.0)
    col_index = start + (offset - KERNEL_PAD) * HALF + channel - HALF
    cols = tl.load(rel_cols + col_index, mask=is_col, other=0.0)
    return convert(tl.where(is_row, rows.to(tl.float32), cols.to(tl.float32)), dtype)


@triton.jit
def table_start(KERNEL_SIZE: tl.constexpr, KERNEL_PAD: tl.constexpr):
    """(T,): what products with the table start from, minus infinity where it has no embedding."""
    embedding = tl.arange(0, 2 * KERNEL_PAD) % KERNEL_PAD
    return tl.where(embedding < KERNEL_SIZE, 0.0, float("-inf"))


@triton.jit
def axis_logits(
    table_logits,
    offset,
    FIRST: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
    AXIS: tl.constexpr,
):
    """q . r of an axis at each pair's ``offset``, minus infinity outside of the window.

    The axis' part of the table begins at FIRST and ends with a row that has no embedding. Where
    there are none at all, ``table_logits`` is None.
    """
    offset = offset.to(tl.uint32)  # negative ones become large numbers
    if table_logits is None:
        logits = tl.where(offset < KERNEL_SIZE, 0.0, float("-inf"))
    else:
        index = tl.minimum(offset, KERNEL_PAD - 1).to(tl.int32)
        logits = tl.gather(table_logits, index + FIRST, AXIS)
    return logits


@triton.jit(do_not_specialize=["positions", "height", "width"])
def forward_kernel(
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    output,
    logsumexp,
    residual,
    added_up,
    query_strides,
    key_strides,
    output_strides,
    residual_strides,
    levels,
    positions,
    height,
    width,
    LEVELS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
    RELATIVE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HALO_W: tl.constexpr,
    CHUNK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries of one head. The values have the keys' strides.

    Where there is a ``residual``, its sum with the output goes to ``added_up``, with the output's
    strides; the output may be None then.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    P: tl.constexpr = CHUNK_H * HALO_W
    T: tl.constexpr = 2 * KERNEL_PAD
    n, head = tl.program_id(1), tl.program_id(0) % NUM_HEADS  # heads of a position lie side by side
    tile, start, height, width = level_of(
        tl.program_id(0) // NUM_HEADS, levels, height, width, LEVELS
    )
    top, left = corner_of(tile, width, BLOCK_H, BLOCK_W)
    tile_rows, tile_cols = tl.arange(0, M) // BLOCK_W, tl.arange(0, M) % BLOCK_W
    rows, cols = top + tile_rows, left + tile_cols
    if RELATIVE:  # before the queries, so that both are waited for at once
        dtype: tl.constexpr = query.dtype.element_ty
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, dtype
        )
    offsets = offsets_of(query_strides, clamp(rows, height), clamp(cols, width), width, PADDED_DIM)
    q = load(base_of(query, query_strides, n, start, head, HEAD_DIM), offsets, HEAD_DIM, PADDED_DIM)

    halo_cols = tl.arange(0, HALO_W)
    col_offset = halo_cols[None] - tile_cols[:, None]
    col_offset = tl.where(within(left - RADIUS + halo_cols, width)[None], col_offset, -1)
    table_logits = None
    if RELATIVE:
        table_logits = tl.broadcast_to(table_start(KERNEL_SIZE, KERNEL_PAD)[None], [M, T])
        table_logits = dot(q, tl.trans(table), table_logits, PRECISION)
    col_logits = axis_logits(table_logits, col_offset, KERNEL_PAD, KERNEL_SIZE, KERNEL_PAD, 1)

    key_base = base_of(key, key_strides, n, start, head, HEAD_DIM)
    value_base = base_of(value, key_strides, n, start, head, HEAD_DIM)
    chunk_rows, chunk_cols = tl.arange(0, P) // HALO_W, tl.arange(0, P) % HALO_W
    key_cols = clamp(left - RADIUS + chunk_cols, width)
    maximum = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M, 8], tl.float32)  # of 8 columns: each is a thread's own until the end
    result = tl.zeros([M, PADDED_DIM], tl.float32)
    for first in range(0, BLOCK_H + KERNEL_SIZE - 1, CHUNK_H):
        key_rows = clamp(top - RADIUS + first + chunk_rows, height)
        offsets = offsets_of(key_strides, key_rows, key_cols, width, PADDED_DIM)
        k = load(key_base, offsets, HEAD_DIM, PADDED_DIM)
        v = load(value_base, offsets, HEAD_DIM, PADDED_DIM)
        halo_rows = first + tl.arange(0, CHUNK_H)
        row_offset = halo_rows[None] - tile_rows[:, None]
        row_offset = tl.where(within(top - RADIUS + halo_rows, height)[None], row_offset, -1)
        row_logits = axis_logits(table_logits, row_offset, 0, KERNEL_SIZE, KERNEL_PAD, 1)
        position_logits = row_logits[:, :, None] + col_logits[:, None, :]
        position_logits = tl.reshape(position_logits, [M, P])
        logits = dot(q, tl.trans(k), position_logits, PRECISION)

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        weights = tl.exp2(logits * LOG2_E - (new_maximum * LOG2_E)[:, None])
        total = total * rescale[:, None] + tl.sum(tl.reshape(weights, [M, P // 8, 8]), 1)
        result = dot(convert(weights, v.dtype), v, result * rescale[:, None], PRECISION)
        maximum = new_maximum

    inside = (rows < height) & (cols < width)
    log_total = log2(tl.sum(total, 1))
    result *= tl.exp2(-log_total)[:, None]  # a division takes ten times as many instructions
    offsets = offsets_of(output_strides, rows, cols, width, PADDED_DIM)
    if output is not None:
        base = base_of(output, output_strides, n, start, head, HEAD_DIM)
        store(base, offsets, result, inside, HEAD_DIM, PADDED_DIM)
    if residual is not None:
        near = offsets_of(
            residual_strides, clamp(rows, height), clamp(cols, width), width, PADDED_DIM
        )
        base = base_of(residual, residual_strides, n, start, head, HEAD_DIM)
        # Rounded first, as the output is from which the backward adds it up again.
        result = convert(result, query.dtype.element_ty).to(tl.float32)
        result += load(base, near, HEAD_DIM, PADDED_DIM).to(tl.float32)
        base = base_of(added_up, output_strides, n, start, head, HEAD_DIM)
        store(base, offsets, result, inside, HEAD_DIM, PADDED_DIM)
    plane = (n.to(tl.int64) * NUM_HEADS + head) * positions + start
    maximum += log_total * LN_2
    tl.store(logsumexp + plane + (rows * width + cols), maximum, mask=inside)
