"""The kernels of the backward of ``local_attention``. Shapes as in :mod:`.kernels`."""

import triton
import triton.language as tl

from .kernels import (
    LOG2_E,
    axis_logits,
    base_of,
    clamp,
    convert,
    corner_of,
    dot,
    level_of,
    load,
    load_table,
    offsets_of,
    parts_of_table,
    store,
    table_start,
    within,
)


@triton.jit
def halves_of(table_logits):
    """Of (T, P) the rows' part and the columns', each (T / 2, P)."""
    rows: tl.constexpr = table_logits.shape[0] // 2
    halves = tl.reshape(table_logits, [2, rows, table_logits.shape[1]])
    return tl.split(tl.permute(halves, (1, 2, 0)))


@triton.jit
def gradient_of_offsets(grad_halo, index, seen):
    """(M, T) of (M, rows or columns of the halo): each query's own window of its halo."""
    seen = seen & (index >= 0) & (index < grad_halo.shape[1])
    return tl.where(seen, tl.gather(grad_halo, tl.where(seen, index, 0), 1), 0.0)


@triton.jit
def store_table_sums(
    partial_sums,
    total,
    head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
):
    """Writes this program's (T, D) gradient of a head's table of embeddings.

    ``partial_sums`` is (programs, heads, 2 * KERNEL_SIZE, HEAD_DIM / 2), those of rows first.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    sums = partial_sums + (tl.program_id(1) * NUM_HEADS + head) * (2 * KERNEL_SIZE * HALF)
    offset, channel = tl.arange(0, 2 * KERNEL_PAD)[:, None], tl.arange(0, PADDED_DIM)[None]
    is_row, is_col = parts_of_table(offset, channel, HEAD_DIM, KERNEL_SIZE, KERNEL_PAD)
    embedding = tl.where(is_row, offset, offset - KERNEL_PAD + KERNEL_SIZE)
    number = tl.where(is_row, channel, channel - HALF)
    tl.store(sums + (embedding * HALF + number), total, is_row | is_col)


@triton.jit(do_not_specialize=["num_images", "tiles", "positions", "height", "width"])
def query_gradient_kernel(
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    output,
    logsumexp,
    grad_output,
    grad_query,
    mean,
    partial_sums,
    query_strides,
    key_strides,
    output_strides,
    grad_output_strides,
    grad_query_strides,
    levels,
    num_images,
    tiles,
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
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Many tiles of queries of one head, one after the other.

    Writes their gradients, ``mean`` (N, heads, H, W), which is grad_output . output, and this
    program's sums for the embeddings, ``partial_sums``.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    P: tl.constexpr = CHUNK_H * HALO_W
    T: tl.constexpr = 2 * KERNEL_PAD
    head = tl.program_id(0)
    only_height, only_width = height, width
    tile_rows, tile_cols = tl.arange(0, M) // BLOCK_W, tl.arange(0, M) % BLOCK_W
    chunk_rows, chunk_cols = tl.arange(0, P) // HALO_W, tl.arange(0, P) % HALO_W
    halo_cols = tl.arange(0, HALO_W)
    halo_offset = halo_cols[None] - tile_cols[:, None]
    if RELATIVE:
        dtype: tl.constexpr = query.dtype.element_ty
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, dtype
        )
        table_total = tl.zeros([T, PADDED_DIM], tl.float32)
    for index in range(tl.program_id(1), num_images * tiles, tl.num_programs(1)):
        n = index // tiles
        tile, start, height, width = level_of(
            index % tiles, levels, only_height, only_width, LEVELS
        )
        top, left = corner_of(tile, width, BLOCK_H, BLOCK_W)
        rows, cols = top + tile_rows, left + tile_cols
        inside = (rows < height) & (cols < width)
        near_rows, near_cols = clamp(rows, height), clamp(cols, width)
        plane = (n.to(tl.int64) * NUM_HEADS + head) * positions + start
        position = rows * width + cols
        # In this order, because the compiler waits for what a product needs before it goes on.
        offsets = offsets_of(output_strides, near_rows, near_cols, width, PADDED_DIM)
        base = base_of(output, output_strides, n, start, head, HEAD_DIM)
        out = load(base, offsets, HEAD_DIM, PADDED_DIM)
        offsets = offsets_of(grad_output_strides, near_rows, near_cols, width, PADDED_DIM)
        base = base_of(grad_output, grad_output_strides, n, start, head, HEAD_DIM)
        grad = load(base, offsets, HEAD_DIM, PADDED_DIM)
        offsets = offsets_of(query_strides, near_rows, near_cols, width, PADDED_DIM)
        base = base_of(query, query_strides, n, start, head, HEAD_DIM)
        q = load(base, offsets, HEAD_DIM, PADDED_DIM)
        # Outside the map the weights come out as zero.
        lse = tl.load(logsumexp + plane + position, mask=inside, other=float("inf"))
        tile_mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        tl.store(mean + plane + position, tile_mean, mask=inside)

        col_offset = tl.where(within(left - RADIUS + halo_cols, width)[None], halo_offset, -1)
        table_logits = None
        if RELATIVE:
            table_logits = tl.broadcast_to(table_start(KERNEL_SIZE, KERNEL_PAD)[None], [M, T])
            table_logits = dot(q, tl.trans(table), table_logits, PRECISION)
            grad_cols = tl.zeros([M, HALO_W], tl.float32)
            grad_rows = tl.zeros([M, CHUNKS, CHUNK_H], tl.float32)
        col_logits = axis_logits(table_logits, col_offset, KERNEL_PAD, KERNEL_SIZE, KERNEL_PAD, 1)
        col_logits -= lse[:, None]
        key_base = base_of(key, key_strides, n, start, head, HEAD_DIM)
        value_base = base_of(value, key_strides, n, start, head, HEAD_DIM)
        key_cols = clamp(left - RADIUS + chunk_cols, width)
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
            logits = tl.reshape(row_logits[:, :, None] + col_logits[:, None, :], [M, P])
            weights = tl.exp2(dot(q, tl.trans(k), logits, PRECISION) * LOG2_E)
            centred = dot(
                grad, tl.trans(v), tl.broadcast_to(-tile_mean[:, None], [M, P]), PRECISION
            )
            grad_chunk = weights * centred
            result = dot(convert(grad_chunk, k.dtype), k, result, PRECISION)
            if RELATIVE:
                by_axis = tl.reshape(grad_chunk, [M, CHUNK_H, HALO_W])
                grad_cols += tl.sum(by_axis, 1)
                current = tl.arange(0, CHUNKS)[None, :, None] == first // CHUNK_H
                grad_rows = tl.where(current, tl.sum(by_axis, 2)[:, None, :], grad_rows)
        if RELATIVE:
            grad_rows = tl.reshape(grad_rows, [M, CHUNKS * CHUNK_H])
            offset = tl.arange(0, T)[None]
            grad_logits = gradient_of_offsets(
                grad_rows, tile_rows[:, None] + offset, offset < KERNEL_SIZE
            )
            offset -= KERNEL_PAD
            grad_logits += gradient_of_offsets(
                grad_cols, tile_cols[:, None] + offset, (offset >= 0) & (offset < KERNEL_SIZE)
            )
            grad_logits = convert(grad_logits, q.dtype)
            result = dot(grad_logits, table, result, PRECISION)
            table_total = dot(tl.trans(grad_logits), q, table_total, PRECISION)
        offsets = offsets_of(grad_query_strides, rows, cols, width, PADDED_DIM)
        base = base_of(grad_query, grad_query_strides, n, start, head, HEAD_DIM)
        store(base, offsets, result, inside, HEAD_DIM, PADDED_DIM)
    if RELATIVE:
        store_table_sums(
            partial_sums,
            table_total,
            head,
            NUM_HEADS,
            HEAD_DIM,
            PADDED_DIM,
            KERNEL_SIZE,
            KERNEL_PAD,
        )


@triton.jit(do_not_specialize=["programs"])
def embedding_gradient_kernel(
    partial_sums,
    grad_rows,
    grad_cols,
    programs,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    PROGRAMS_AT_ONCE: tl.constexpr,
):
    """The gradient of one embedding of one head, from ``partial_sums``."""
    HALF: tl.constexpr = HEAD_DIM // 2
    head, embedding = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, PADDED_DIM)
    total = tl.zeros([PROGRAMS_AT_ONCE, PADDED_DIM], tl.float32)
    for first in range(0, programs, PROGRAMS_AT_ONCE):
        program = first + tl.arange(0, PROGRAMS_AT_ONCE)
        start = ((program * NUM_HEADS + head) * (2 * KERNEL_SIZE) + embedding) * HALF
        mask = (program < programs)[:, None] & (channel < HALF)[None]
        total += tl.load(partial_sums + start[:, None] + channel[None], mask, 0.0)
    result = tl.sum(total, 0)
    index = (head * KERNEL_SIZE + embedding % KERNEL_SIZE) * HALF + channel
    if embedding < KERNEL_SIZE:
        tl.store(grad_rows + index, convert(result, grad_rows.dtype.element_ty), channel < HALF)
    else:
        tl.store(grad_cols + index, convert(result, grad_cols.dtype.element_ty), channel < HALF)


@triton.jit(do_not_specialize=["positions", "height", "width"])
def key_value_gradient_kernel(
    query,
    key,
    value,
    rel_rows,
    rel_cols,
    logsumexp,
    grad_output,
    mean,
    grad_key,
    grad_value,
    query_strides,
    key_strides,
    grad_output_strides,
    grad_key_strides,
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
    """One tile of keys of one head, which gathers from all queries that see any of them.

    The window is symmetric, so the halo of queries is that of the forward's keys.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    P: tl.constexpr = CHUNK_H * HALO_W
    T: tl.constexpr = 2 * KERNEL_PAD
    n, head = tl.program_id(1), tl.program_id(0) % NUM_HEADS
    tile, start, height, width = level_of(
        tl.program_id(0) // NUM_HEADS, levels, height, width, LEVELS
    )
    top, left = corner_of(tile, width, BLOCK_H, BLOCK_W)
    rows, cols = top + tl.arange(0, M) // BLOCK_W, left + tl.arange(0, M) % BLOCK_W
    offsets = offsets_of(key_strides, clamp(rows, height), clamp(cols, width), width, PADDED_DIM)
    k = load(base_of(key, key_strides, n, start, head, HEAD_DIM), offsets, HEAD_DIM, PADDED_DIM)
    v = load(base_of(value, key_strides, n, start, head, HEAD_DIM), offsets, HEAD_DIM, PADDED_DIM)
    if RELATIVE:
        dtype: tl.constexpr = query.dtype.element_ty
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, dtype
        )

    tile_rows, tile_cols = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    chunk_rows, chunk_cols = tl.arange(0, P) // HALO_W, tl.arange(0, P) % HALO_W
    q_cols = left - RADIUS + chunk_cols
    near_cols = clamp(q_cols, width)
    # Of the offset from a query to a key: -RADIUS is 0.
    col_offset = tile_cols[:, None] - chunk_cols[None] + 2 * RADIUS
    cols_inside = within(q_cols, width)
    query_base = base_of(query, query_strides, n, start, head, HEAD_DIM)
    grad_base = base_of(grad_output, grad_output_strides, n, start, head, HEAD_DIM)
    plane = (n.to(tl.int64) * NUM_HEADS + head) * positions + start
    key_result = tl.zeros([M, PADDED_DIM], tl.float32)
    value_result = tl.zeros([M, PADDED_DIM], tl.float32)
    # One chunk ahead: the compiler loads only what goes into products before it is needed.
    next_position = clamp(top - RADIUS + chunk_rows, height) * width + near_cols
    next_lse = tl.load(logsumexp + plane + next_position)
    next_mean = tl.load(mean + plane + next_position)
    for first in range(0, BLOCK_H + KERNEL_SIZE - 1, CHUNK_H):
        q_rows = top - RADIUS + first + chunk_rows
        near_rows = clamp(q_rows, height)
        offsets = offsets_of(query_strides, near_rows, near_cols, width, PADDED_DIM)
        q = load(query_base, offsets, HEAD_DIM, PADDED_DIM)
        offsets = offsets_of(grad_output_strides, near_rows, near_cols, width, PADDED_DIM)
        grad = load(grad_base, offsets, HEAD_DIM, PADDED_DIM)
        lse, q_mean = next_lse, next_mean
        next_position = clamp(q_rows + CHUNK_H, height) * width + near_cols
        next_lse = tl.load(logsumexp + plane + next_position)
        next_mean = tl.load(mean + plane + next_position)

        # Outside the map the weights come out as zero.
        lse = tl.where(cols_inside & within(q_rows, height), lse, float("inf"))
        row_offset = tile_rows[:, None] - (first + chunk_rows)[None] + 2 * RADIUS
        row_table, col_table = None, None
        if RELATIVE:
            table_logits = tl.broadcast_to(table_start(KERNEL_SIZE, KERNEL_PAD)[:, None], [T, P])
            table_logits = dot(table, tl.trans(q), table_logits, PRECISION)
            # Gathered half by half: fewer registers, and fewer ways through shared memory.
            row_table, col_table = halves_of(table_logits)
        row_logits = axis_logits(row_table, row_offset, 0, KERNEL_SIZE, KERNEL_PAD, 0)
        col_logits = axis_logits(col_table, col_offset, 0, KERNEL_SIZE, KERNEL_PAD, 0)
        # The columns' part, which each row of keys has, is what the product starts from.
        row_logits = row_logits * LOG2_E - (lse * LOG2_E)[None]
        col_logits = tl.broadcast_to(col_logits[None], [BLOCK_H, BLOCK_W, P])
        logits = dot(k, tl.trans(q), tl.reshape(col_logits, [M, P]), PRECISION)
        logits = tl.reshape(logits, [BLOCK_H, BLOCK_W, P]) * LOG2_E + row_logits[:, None, :]
        weights = tl.exp2(tl.reshape(logits, [M, P]))
        value_result = dot(convert(weights, grad.dtype), grad, value_result, PRECISION)
        centred = dot(v, tl.trans(grad), tl.broadcast_to(-q_mean[None], [M, P]), PRECISION)
        key_result = dot(convert(weights * centred, q.dtype), q, key_result, PRECISION)

    inside = (rows < height) & (cols < width)
    offsets = offsets_of(grad_key_strides, rows, cols, width, PADDED_DIM)
    base = base_of(grad_key, grad_key_strides, n, start, head, HEAD_DIM)
    store(base, offsets, key_result, inside, HEAD_DIM, PADDED_DIM)
    base = base_of(grad_value, grad_key_strides, n, start, head, HEAD_DIM)
    store(base, offsets, value_result, inside, HEAD_DIM, PADDED_DIM)
