"""The two kernels of the backward of ``local_attention``. Shapes as in :mod:`.kernels`."""

import triton
import triton.language as tl

from .kernels import (
    LOG2_E,
    axis_logits,
    convert,
    dot,
    load_map,
    load_table,
    positions,
    store_map,
    tile_of_program,
)


@triton.jit
def gradient_of_offsets(grad_halo, index, seen):
    """(M, T) of (M, rows or columns of the halo): each query's own window of its halo."""
    seen = seen & (index >= 0) & (index < grad_halo.shape[1])
    return tl.where(seen, tl.gather(grad_halo, tl.where(seen, index, 0), 1), 0.0)


@triton.jit(do_not_specialize=["num_images", "height", "width"])
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
    value_strides,
    output_strides,
    grad_output_strides,
    grad_query_strides,
    num_images,
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
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Many tiles of queries of one head, one after the other.

    Writes their gradients, ``mean`` (N, heads, H, W), which is grad_output . output, and this
    program's sum for the table of embeddings: ``partial_sums`` is (programs, heads, T, D).
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    P: tl.constexpr = CHUNK_H * HALO_W
    T: tl.constexpr = 2 * KERNEL_PAD
    head, num_heads = tl.program_id(0), tl.num_programs(0)
    tiles_across = tl.cdiv(width, BLOCK_W)
    tiles = tiles_across * tl.cdiv(height, BLOCK_H)
    if RELATIVE:
        dtype: tl.constexpr = query.dtype.element_ty
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, dtype
        )
        table_total = tl.zeros([T, PADDED_DIM], tl.float32)
    for index in range(tl.program_id(1), num_images * tiles, tl.num_programs(1)):
        n, tile = index // tiles, index % tiles
        top, left = tile // tiles_across * BLOCK_H, tile % tiles_across * BLOCK_W
        rows, cols, inside = positions(top, left, height, width, M, BLOCK_W)
        q = load_map(query, query_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM)
        grad = load_map(
            grad_output, grad_output_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM
        )
        out = load_map(output, output_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM)
        tile_mean = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
        plane = (n.to(tl.int64) * num_heads + head) * height * width
        position = rows * width + cols
        tl.store(mean + plane + position, tile_mean, mask=inside)
        # Outside the map the weights come out as zero.
        lse = tl.load(logsumexp + plane + position, mask=inside, other=float("inf"))

        halo_cols = left - RADIUS + tl.arange(0, HALO_W)
        col_offset = halo_cols[None] - cols[:, None] + RADIUS
        col_seen = (col_offset >= 0) & (col_offset < KERNEL_SIZE)
        col_seen = col_seen & (halo_cols >= 0)[None] & (halo_cols < width)[None]
        if RELATIVE:
            table_logits = dot(q, tl.trans(table), tl.zeros([M, T], tl.float32), PRECISION)
            col_logits = axis_logits(table_logits, col_offset, col_seen, KERNEL_PAD, 1)
            grad_cols = tl.zeros([M, HALO_W], tl.float32)
            grad_rows = tl.zeros([M, CHUNKS, CHUNK_H], tl.float32)
        else:
            col_logits = tl.where(col_seen, 0.0, float("-inf"))
        result = tl.zeros([M, PADDED_DIM], tl.float32)
        start = tl.maximum(top - RADIUS, 0)
        for first in range(start, tl.minimum(top + BLOCK_H + RADIUS, height), CHUNK_H):
            key_rows, key_cols, key_inside = positions(
                first, left - RADIUS, height, width, P, HALO_W
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
            row_logits -= lse[:, None]
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
                current = tl.arange(0, CHUNKS)[None, :, None] == (first - start) // CHUNK_H
                grad_rows = tl.where(current, tl.sum(by_axis, 2)[:, None, :], grad_rows)
        if RELATIVE:
            grad_rows = tl.reshape(grad_rows, [M, CHUNKS * CHUNK_H])
            offset = tl.arange(0, T)[None]
            grad_logits = gradient_of_offsets(
                grad_rows, rows[:, None] - RADIUS - start + offset, offset < KERNEL_SIZE
            )
            offset -= KERNEL_PAD
            grad_logits += gradient_of_offsets(
                grad_cols, cols[:, None] - left + offset, (offset >= 0) & (offset < KERNEL_SIZE)
            )
            grad_logits = convert(grad_logits, q.dtype)
            result = dot(grad_logits, table, result, PRECISION)
            table_total = dot(tl.trans(grad_logits), q, table_total, PRECISION)
        store_map(
            grad_query,
            grad_query_strides,
            n,
            head,
            rows,
            cols,
            inside,
            result,
            HEAD_DIM,
            PADDED_DIM,
        )
    if RELATIVE:
        program = tl.program_id(1) * num_heads + head
        index = tl.arange(0, T)[:, None] * PADDED_DIM + tl.arange(0, PADDED_DIM)[None]
        tl.store(partial_sums + program * T * PADDED_DIM + index, table_total)


@triton.jit(do_not_specialize=["num_heads", "height", "width"])
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
    value_strides,
    grad_output_strides,
    grad_key_strides,
    grad_value_strides,
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
    """One tile of keys of one head, which gathers from all queries that see any of them.

    The window is symmetric, so the halo of queries is that of the forward's keys.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    M: tl.constexpr = BLOCK_H * BLOCK_W
    P: tl.constexpr = CHUNK_H * HALO_W
    n, head, top, left = tile_of_program(num_heads, BLOCK_H, BLOCK_W)
    rows, cols, inside = positions(top, left, height, width, M, BLOCK_W)
    k = load_map(key, key_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM)
    v = load_map(value, value_strides, n, head, rows, cols, inside, HEAD_DIM, PADDED_DIM)
    if RELATIVE:
        dtype: tl.constexpr = query.dtype.element_ty
        table = load_table(
            rel_rows, rel_cols, head, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD, dtype
        )
    tile_rows, tile_cols = top + tl.arange(0, BLOCK_H), left + tl.arange(0, BLOCK_W)
    key_result = tl.zeros([M, PADDED_DIM], tl.float32)
    value_result = tl.zeros([M, PADDED_DIM], tl.float32)
    plane = (n.to(tl.int64) * num_heads + head) * height * width
    for first in range(
        tl.maximum(top - RADIUS, 0), tl.minimum(top + BLOCK_H + RADIUS, height), CHUNK_H
    ):
        q_rows, q_cols, q_inside = positions(first, left - RADIUS, height, width, P, HALO_W)
        q = load_map(query, query_strides, n, head, q_rows, q_cols, q_inside, HEAD_DIM, PADDED_DIM)
        grad = load_map(
            grad_output,
            grad_output_strides,
            n,
            head,
            q_rows,
            q_cols,
            q_inside,
            HEAD_DIM,
            PADDED_DIM,
        )
        position = q_rows * width + q_cols
        # Queries outside the map have weights of zero.
        lse = tl.load(logsumexp + plane + position, mask=q_inside, other=float("inf"))
        q_mean = tl.load(mean + plane + position, mask=q_inside, other=0.0)

        row_offset = tile_rows[:, None] - q_rows[None] + RADIUS
        col_offset = tile_cols[:, None] - q_cols[None] + RADIUS
        row_seen = (row_offset >= 0) & (row_offset < KERNEL_SIZE)
        col_seen = (col_offset >= 0) & (col_offset < KERNEL_SIZE)
        if RELATIVE:
            zeros = tl.zeros([2 * KERNEL_PAD, P], tl.float32)
            table_logits = dot(table, tl.trans(q), zeros, PRECISION)
            row_logits = axis_logits(table_logits, row_offset, row_seen, 0, 0)
            col_logits = axis_logits(table_logits, col_offset, col_seen, KERNEL_PAD, 0)
        else:
            row_logits = tl.where(row_seen, 0.0, float("-inf"))
            col_logits = tl.where(col_seen, 0.0, float("-inf"))
        row_logits -= lse[None]
        logits = tl.reshape(row_logits[:, None, :] + col_logits[None, :, :], [M, P])
        weights = tl.exp2(dot(k, tl.trans(q), logits, PRECISION) * LOG2_E)
        value_result = dot(convert(weights, grad.dtype), grad, value_result, PRECISION)
        centred = dot(v, tl.trans(grad), tl.broadcast_to(-q_mean[None], [M, P]), PRECISION)
        key_result = dot(convert(weights * centred, q.dtype), q, key_result, PRECISION)
    store_map(
        grad_key, grad_key_strides, n, head, rows, cols, inside, key_result, HEAD_DIM, PADDED_DIM
    )
    store_map(
        grad_value,
        grad_value_strides,
        n,
        head,
        rows,
        cols,
        inside,
        value_result,
        HEAD_DIM,
        PADDED_DIM,
    )
