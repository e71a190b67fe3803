"""The forward kernel of ``local_attention``, and what the backward's kernels share with it.

In shapes M stands for the positions of a tile, P for those of a chunk of its halo, D for
PADDED_DIM, T for the 2 * KERNEL_PAD rows of a head's table of embeddings.
"""

import triton
import triton.language as tl

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
    if INTERPRETED and dtype == tl.bfloat16:  # it cuts off the bits that do not fit
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile_of_program(num_heads, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Image, head, top row and left column of the tile that this program works on."""
    index = tl.program_id(0)
    # Heads fastest: where channels are last, they share cache lines.
    head = index % num_heads
    return tl.program_id(2), head, tl.program_id(1) * BLOCK_H, index // num_heads * BLOCK_W


@triton.jit
def positions(top, left, height, width, SIZE: tl.constexpr, ACROSS: tl.constexpr):
    """Rows, columns and "lies inside the map" of SIZE positions, ACROSS in a row."""
    index = tl.arange(0, SIZE)
    rows, cols = top + index // ACROSS, left + index % ACROSS
    # No rows are negative, and negative columns are large unsigned numbers.
    return rows, cols, (rows < height) & (cols.to(tl.uint32) < width.to(tl.uint32))


@triton.jit
def map_pointers(
    base, strides, n, head, rows, cols, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """(positions, D) pointers into an (N, C, H, W) map of any strides."""
    base += n.to(tl.int64) * strides[0] + head * HEAD_DIM * strides[1]
    channels = tl.arange(0, PADDED_DIM)
    return base + (rows * strides[2] + cols * strides[3])[:, None] + (channels * strides[1])[None]


@triton.jit
def map_mask(inside, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    mask = inside[:, None]
    if HEAD_DIM != PADDED_DIM:
        mask = mask & (tl.arange(0, PADDED_DIM) < HEAD_DIM)[None]
    return mask


@triton.jit
def load_map(
    base, strides, n, head, rows, cols, inside, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    """(positions, D) of one head, zero outside the map."""
    pointers = map_pointers(base, strides, n, head, rows, cols, HEAD_DIM, PADDED_DIM)
    return tl.load(pointers, mask=map_mask(inside, HEAD_DIM, PADDED_DIM), other=0.0)


@triton.jit
def store_map(
    base, strides, n, head, rows, cols, inside, x, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr
):
    pointers = map_pointers(base, strides, n, head, rows, cols, HEAD_DIM, PADDED_DIM)
    mask = map_mask(inside, HEAD_DIM, PADDED_DIM)
    tl.store(pointers, convert(x, base.dtype.element_ty), mask=mask)


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
    is_row = (offset < KERNEL_SIZE) & (channel < HALF)
    is_col = (offset >= KERNEL_PAD) & (offset < KERNEL_PAD + KERNEL_SIZE)
    is_col = is_col & (channel >= HALF) & (channel < HEAD_DIM)
    start = head * KERNEL_SIZE * HALF
    rows = tl.load(rel_rows + start + offset * HALF + channel, mask=is_row, other=0.0)
    col_index = start + (offset - KERNEL_PAD) * HALF + channel - HALF
    cols = tl.load(rel_cols + col_index, mask=is_col, other=0.0)
    return convert(tl.where(is_row, rows.to(tl.float32), cols.to(tl.float32)), dtype)


@triton.jit
def axis_logits(table_logits, offset, seen, FIRST: tl.constexpr, AXIS: tl.constexpr):
    """q . r of an axis at each pair's ``offset``, minus infinity for the pairs not ``seen``."""
    index = tl.where(seen, offset + FIRST, 0)
    return tl.where(seen, tl.gather(table_logits, index, AXIS), float("-inf"))


@triton.jit(do_not_specialize=["num_heads", "height", "width"])
def forward_kernel(
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    output,
    logsumexp,
    query_strides,
    key_strides,
    value_strides,
    output_strides,
    num_heads,
    height,
    width,
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
    """One tile of queries of one head."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    n, head, top, left = tile_of_program(num_heads, BLOCK_H, BLOCK_W)
    rows, cols, inside = positions(top, left, height, width, M, BLOCK_W)
    q = load_map(query, query_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM)

    halo_cols = left - RADIUS + tl.arange(0, HALO_W)
    col_offset = halo_cols[None] - cols[:, None] + RADIUS
    col_seen = (col_offset >= 0) & (col_offset < KERNEL_SIZE)
    col_seen = col_seen & (halo_cols >= 0)[None] & (halo_cols < width)[None]
    if RELATIVE:
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, q.dtype
        )
        zeros = tl.zeros([M, 2 * KERNEL_PAD], tl.float32)
        table_logits = dot(q, tl.trans(table), zeros, PRECISION)
        col_logits = axis_logits(table_logits, col_offset, col_seen, KERNEL_PAD, 1)
    else:
        col_logits = tl.where(col_seen, 0.0, float("-inf"))

    maximum = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    result = tl.zeros([M, PADDED_DIM], tl.float32)
    for first in range(
        tl.maximum(top - RADIUS, 0), tl.minimum(top + BLOCK_H + RADIUS, height), CHUNK_H
    ):
        key_rows, key_cols, key_inside = positions(
            first, left - RADIUS, height, width, CHUNK_H * HALO_W, HALO_W
        )
        k = load_map(
            key, key_strides, n, head, key_rows, key_cols, key_inside, HEAD_DIM, PADDED_DIM
        )
        v = load_map(
            value, value_strides, n, head, key_rows, key_cols, key_inside, HEAD_DIM, PADDED_DIM
        )
        halo_rows = first + tl.arange(0, CHUNK_H)
        row_offset = halo_rows[None] - rows[:, None] + RADIUS
        row_seen = (row_offset >= 0) & (row_offset < KERNEL_SIZE) & (halo_rows < height)[None]
        if RELATIVE:
            row_logits = axis_logits(table_logits, row_offset, row_seen, 0, 1)
        else:
            row_logits = tl.where(row_seen, 0.0, float("-inf"))
        position_logits = row_logits[:, :, None] + col_logits[:, None, :]
        position_logits = tl.reshape(position_logits, [M, CHUNK_H * HALO_W])
        logits = dot(q, tl.trans(k), position_logits, PRECISION)

        new_maximum = tl.maximum(maximum, tl.max(logits, 1))
        rescale = tl.exp2((maximum - new_maximum) * LOG2_E)
        weights = tl.exp2(logits * LOG2_E - (new_maximum * LOG2_E)[:, None])
        total = total * rescale + tl.sum(weights, 1)
        result = dot(convert(weights, v.dtype), v, result * rescale[:, None], PRECISION)
        maximum = new_maximum

    result *= (1.0 / total)[:, None]
    store_map(output, output_strides, n, head, rows, cols, inside, result, HEAD_DIM, PADDED_DIM)
    plane = (n.to(tl.int64) * num_heads + head) * height * width
    maximum += tl.log2(total) * LN_2
    tl.store(logsumexp + plane + (rows * width + cols), maximum, mask=inside)
