"""The kernels of the backward for heads of few channels. Shapes as in :mod:`.narrow_kernels`."""

# The compiler unrolls the loops in which tuples grow.
# mypy: disable-error-code="assignment, misc, operator"

import triton
import triton.language as tl

from .backward_kernels import store_table_sums
from .kernels import LOG2_E, base_of, dot, within
from .narrow_kernels import (
    column_logits,
    load_channels,
    load_numbers,
    nearest,
    row_logits,
    store_channels,
    threads_of,
)
from .tuples import add_scaled, part_of, product, repeat, scale, shift


@triton.jit
def table_of(row_numbers, col_numbers, KERNEL_SIZE: tl.constexpr, KERNEL_PAD: tl.constexpr):
    """Of each offset one number, in the order of ``kernels.load_table``, with zeros between."""
    padding = repeat(tl.zeros(row_numbers[0].shape, tl.float32), KERNEL_PAD - KERNEL_SIZE)
    return row_numbers + padding + col_numbers + padding


@triton.jit(do_not_specialize=["positions", "height", "width"])
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
    grad_table,
    query_strides,
    key_strides,
    output_strides,
    grad_output_strides,
    grad_query_strides,
    levels,
    positions,
    height,
    width,
    LEVELS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of queries of HEADS heads.

    Writes their gradients, ``mean`` (N, heads, H, W), which is grad_output . output, and
    ``grad_table`` (N, positions, heads, T): the gradient of each query's products with the table
    of embeddings.
    """
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    HALF: tl.constexpr = HEAD_DIM // 2
    T: tl.constexpr = 2 * KERNEL_PAD
    n, first_head, start, height, width, head, row, col = threads_of(
        levels, height, width, LEVELS, NUM_HEADS, HEADS, BLOCK_H, BLOCK_W, STRIP
    )
    channel = head * HEAD_DIM
    zeros = tl.zeros(row.shape, tl.float32)
    plane = (n.to(tl.int64) * NUM_HEADS + first_head) * positions + start
    query_base = base_of(query, query_strides, n, start, first_head, HEAD_DIM)
    output_base = base_of(output, output_strides, n, start, first_head, HEAD_DIM)
    grad_base = base_of(grad_output, grad_output_strides, n, start, first_head, HEAD_DIM)
    q, grads, starts, means = (), (), (), ()
    for i in tl.static_range(STRIP):
        position = nearest(row, col + i, height, width)
        inside = (row < height) & (col + i < width)
        x = load_channels(query_base, position * query_strides[1] + channel, HEAD_DIM)
        grad = load_channels(grad_base, position * grad_output_strides[1] + channel, HEAD_DIM)
        out = load_channels(output_base, position * output_strides[1] + channel, HEAD_DIM)
        query_mean = product(grad, out, 0.0, HEAD_DIM)
        place = head * positions + position
        tl.store(mean + plane + place, query_mean, inside)
        # Outside the map the weights come out as zero.
        lse = tl.load(logsumexp + plane + place, inside, float("inf"))
        q += (scale(x, LOG2_E, HEAD_DIM),)
        grads += (grad,)
        starts += (-lse * LOG2_E,)
        means += (query_mean,)
    embeddings = (first_head + head) * (KERNEL_SIZE * HALF)
    col_logits = column_logits(
        q, starts, col, width, rel_cols, embeddings, HALF, KERNEL_SIZE, STRIP
    )

    key_base = base_of(key, key_strides, n, start, first_head, HEAD_DIM)
    value_base = base_of(value, key_strides, n, start, first_head, HEAD_DIM)
    result = repeat(repeat(zeros, HEAD_DIM), STRIP)
    col_grads = repeat(repeat(zeros, KERNEL_SIZE), STRIP)
    row_grads = col_grads
    for r in range(KERNEL_SIZE):
        key_row = row + (r - RADIUS)
        inside = within(key_row, height)
        of_row = row_logits(q, inside, rel_rows, embeddings + r * HALF, HALF, STRIP)
        row_grad = repeat(zeros, STRIP)
        for j in tl.static_range(STRIP + KERNEL_SIZE - 1):
            position = nearest(key_row, col + (j - RADIUS), height, width)
            offsets = position * key_strides[1] + channel
            k = load_channels(key_base, offsets, HEAD_DIM)
            v = load_channels(value_base, offsets, HEAD_DIM)
            new_result, new_col_grads, new_row_grad = (), (), ()
            for i in tl.static_range(STRIP):
                if j >= i and j - i < KERNEL_SIZE:
                    logit = product(q[i], k, col_logits[i][j - i] + of_row[i], HEAD_DIM)
                    centred = product(grads[i], v, -means[i], HEAD_DIM)
                    grad_logit = tl.exp2(logit) * centred
                    new_result += (add_scaled(result[i], grad_logit, k, HEAD_DIM),)
                    new_row_grad += (row_grad[i] + grad_logit,)
                    # After a row each is in its place again.
                    of_offset = col_grads[i][0] + grad_logit
                    new_col_grads += (shift(col_grads[i], of_offset, KERNEL_SIZE),)
                else:
                    new_result += (result[i],)
                    new_row_grad += (row_grad[i],)
                    new_col_grads += (col_grads[i],)
            result, col_grads, row_grad = new_result, new_col_grads, new_row_grad
        # After all rows each is in its place.
        new_row_grads = ()
        for i in tl.static_range(STRIP):
            new_row_grads += (shift(row_grads[i], row_grad[i], KERNEL_SIZE),)
        row_grads = new_row_grads

    if rel_rows is not None:
        for offset in tl.static_range(KERNEL_SIZE):
            of_row = load_numbers(rel_rows, embeddings + offset * HALF, HALF)
            of_col = load_numbers(rel_cols, embeddings + offset * HALF, HALF)
            new_result = ()
            for i in tl.static_range(STRIP):
                first = part_of(result[i], 0, HALF)
                second = part_of(result[i], HALF, HALF)
                first = add_scaled(first, row_grads[i][offset], of_row, HALF)
                second = add_scaled(second, col_grads[i][offset], of_col, HALF)
                new_result += (first + second,)
            result = new_result
    base = base_of(grad_query, grad_query_strides, n, start, first_head, HEAD_DIM)
    for i in tl.static_range(STRIP):
        inside = (row < height) & (col + i < width)
        position = row * width + col + i
        offsets = position * grad_query_strides[1] + channel
        store_channels(base, offsets, result[i], inside, HEAD_DIM)
        if grad_table is not None:
            numbers = table_of(row_grads[i], col_grads[i], KERNEL_SIZE, KERNEL_PAD)
            first_table = (n.to(tl.int64) * positions + start) * NUM_HEADS + first_head
            offsets = (position.to(tl.int64) * NUM_HEADS + head) * T
            store_channels(grad_table + first_table * T, offsets, numbers, inside, T)


@triton.jit(do_not_specialize=["num_images", "positions"])
def table_sums_kernel(
    query,
    grad_table,
    partial_sums,
    query_strides,
    num_images,
    positions,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    KERNEL_PAD: tl.constexpr,
    POSITIONS_AT_ONCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Many positions of a head: their part of the gradients of its embeddings.

    Reads ``grad_table``, writes this program's sums as the other kernel of the gradient of queries.
    """
    T: tl.constexpr = 2 * KERNEL_PAD
    head = tl.program_id(0)
    total = tl.zeros([T, PADDED_DIM], tl.float32)
    tiles = tl.cdiv(positions, POSITIONS_AT_ONCE)
    for index in range(tl.program_id(1), num_images * tiles, tl.num_programs(1)):
        n = (index // tiles).to(tl.int64)
        position = index % tiles * POSITIONS_AT_ONCE + tl.arange(0, POSITIONS_AT_ONCE)
        inside = (position < positions)[:, None]
        channel = tl.arange(0, PADDED_DIM)[None]
        base = base_of(query, query_strides, n, 0, head, HEAD_DIM)
        mask = inside & (channel < HEAD_DIM)
        q = tl.load(base + (position * query_strides[1])[:, None] + channel, mask, 0.0)
        base = grad_table + (n * positions * NUM_HEADS + head) * T
        offsets = (position.to(tl.int64) * (NUM_HEADS * T))[:, None] + tl.arange(0, T)[None]
        grads = tl.load(base + offsets, inside, 0.0)
        total = dot(tl.trans(grads), q, total, PRECISION)
    store_table_sums(
        partial_sums, total, head, NUM_HEADS, HEAD_DIM, PADDED_DIM, KERNEL_SIZE, KERNEL_PAD
    )


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
    KERNEL_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of keys of HEADS heads. In all else as the other kernel of these gradients."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    HALF: tl.constexpr = HEAD_DIM // 2
    n, first_head, start, height, width, head, row, col = threads_of(
        levels, height, width, LEVELS, NUM_HEADS, HEADS, BLOCK_H, BLOCK_W, STRIP
    )
    channel = head * HEAD_DIM
    zeros = tl.zeros(row.shape, tl.float32)
    key_base = base_of(key, key_strides, n, start, first_head, HEAD_DIM)
    value_base = base_of(value, key_strides, n, start, first_head, HEAD_DIM)
    keys, values, col_embeddings = (), (), ()
    for i in tl.static_range(STRIP):
        position = nearest(row, col + i, height, width)
        offsets = position * key_strides[1] + channel
        k = load_channels(key_base, offsets, HEAD_DIM)
        keys += (scale(k, LOG2_E, HEAD_DIM),)
        values += (load_channels(value_base, offsets, HEAD_DIM),)
    embeddings = (first_head + head) * (KERNEL_SIZE * HALF)
    if rel_cols is not None:
        for offset in tl.static_range(KERNEL_SIZE):
            embedding = load_numbers(rel_cols, embeddings + offset * HALF, HALF)
            col_embeddings += (scale(embedding, LOG2_E, HALF),)

    query_base = base_of(query, query_strides, n, start, first_head, HEAD_DIM)
    grad_base = base_of(grad_output, grad_output_strides, n, start, first_head, HEAD_DIM)
    plane = (n.to(tl.int64) * NUM_HEADS + first_head) * positions + start
    key_result = repeat(repeat(zeros, HEAD_DIM), STRIP)
    value_result = key_result
    for r in range(KERNEL_SIZE):  # the offset from queries to keys
        q_row = row - (r - RADIUS)
        if rel_rows is not None:
            embedding = load_numbers(rel_rows, embeddings + r * HALF, HALF)
            row_embedding = scale(embedding, LOG2_E, HALF)
        for j in tl.static_range(STRIP + KERNEL_SIZE - 1):
            q_col = col + (j - RADIUS)
            position = nearest(q_row, q_col, height, width)
            q = load_channels(query_base, position * query_strides[1] + channel, HEAD_DIM)
            grad = load_channels(grad_base, position * grad_output_strides[1] + channel, HEAD_DIM)
            place = head * positions + position
            lse = tl.load(logsumexp + plane + place) * LOG2_E
            q_mean = tl.load(mean + plane + place)
            # Outside the map the weights come out as zero.
            of_row = tl.where(within(q_row, height) & within(q_col, width), -lse, float("-inf"))
            if rel_rows is not None:
                of_row = product(q, row_embedding, of_row, HALF)
            new_keys, new_values = (), ()
            for i in tl.static_range(STRIP):
                if j >= i and j - i < KERNEL_SIZE:
                    logit = of_row
                    if rel_cols is not None:
                        embedding = col_embeddings[i - j + KERNEL_SIZE - 1]
                        logit = product(part_of(q, HALF, HALF), embedding, logit, HALF)
                    weight = tl.exp2(product(q, keys[i], logit, HEAD_DIM))
                    centred = product(grad, values[i], -q_mean, HEAD_DIM)
                    new_keys += (add_scaled(key_result[i], weight * centred, q, HEAD_DIM),)
                    new_values += (add_scaled(value_result[i], weight, grad, HEAD_DIM),)
                else:
                    new_keys += (key_result[i],)
                    new_values += (value_result[i],)
            key_result, value_result = new_keys, new_values

    key_base = base_of(grad_key, grad_key_strides, n, start, first_head, HEAD_DIM)
    value_base = base_of(grad_value, grad_key_strides, n, start, first_head, HEAD_DIM)
    for i in tl.static_range(STRIP):
        inside = (row < height) & (col + i < width)
        offsets = (row * width + col + i) * grad_key_strides[1] + channel
        store_channels(key_base, offsets, key_result[i], inside, HEAD_DIM)
        store_channels(value_base, offsets, value_result[i], inside, HEAD_DIM)
