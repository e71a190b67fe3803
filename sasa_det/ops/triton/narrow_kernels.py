"""The forward kernel for heads of few channels, and what the backward's kernels share with it.

Products on tensor cores are 16 numbers deep at least, half of them padding with 8 channels, and
what is loaded from the map of such a head is half of what the memory sends. Here a program takes
several heads, whose channels lie side by side, and each thread a strip of positions of one head,
neighbours in a row: it needs nothing that another thread has. Every tensor is (threads,), and
tuples go through positions, channels and offsets. Maps, and what begins with capitals, as in
:mod:`.kernels`; logits are in units of log 2.
"""

# The compiler unrolls the loops in which tuples grow.
# mypy: disable-error-code="assignment, misc, operator"

import triton
import triton.language as tl

from .kernels import (
    LN_2,
    LOG2_E,
    LOWEST,
    base_of,
    clamp,
    convert,
    corner_of,
    level_of,
    log2,
    within,
)
from .tuples import add_scaled, part_of, product, repeat, scale


@triton.jit
def threads_of(
    levels,
    height,
    width,
    LEVELS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Of the program its image, first head, and its map's first position, height and width.

    And of each of its threads the head, counted from the first, and where its strip begins.
    """
    GROUPS: tl.constexpr = NUM_HEADS // HEADS
    STRIPS: tl.constexpr = BLOCK_W // STRIP
    n, first_head = tl.program_id(1), tl.program_id(0) % GROUPS * HEADS
    tile, start, height, width = level_of(tl.program_id(0) // GROUPS, levels, height, width, LEVELS)
    top, left = corner_of(tile, width, BLOCK_H, BLOCK_W)
    thread = tl.arange(0, HEADS * BLOCK_H * STRIPS)  # heads of a position lie side by side
    strip = thread // HEADS
    row, col = top + strip // STRIPS, left + strip % STRIPS * STRIP
    return n, first_head, start, height, width, thread % HEADS, row, col


@triton.jit
def nearest(row, col, height, width):
    """Of a position, or of the one of the map's that is nearest to it, the index."""
    return clamp(row, height) * width + clamp(col, width)


@triton.jit
def channels_of(x, COUNT: tl.constexpr):
    """The COUNT (2, 4 or 8) tensors (threads,) of a tensor (threads, COUNT)."""
    channels = (x,)
    for level in tl.static_range((COUNT > 1) + (COUNT > 2) + (COUNT > 4)):
        parts = ()
        for i in tl.static_range(2**level):
            halves = tl.reshape(channels[i], [x.shape[0], 2, COUNT // 2 ** (level + 1)])
            parts += tl.split(tl.permute(halves, (0, 2, 1)))
        channels = parts
    flat = ()
    for i in tl.static_range(COUNT):
        flat += (tl.reshape(channels[i], [x.shape[0]]),)
    return flat


@triton.jit
def load_numbers(base, offsets, COUNT: tl.constexpr):
    """COUNT numbers (threads,) in float32, from these offsets (threads,) on."""
    MOST: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth  # 16 bytes
    AT_ONCE: tl.constexpr = COUNT if COUNT < MOST else MOST
    numbers = ()
    for first in tl.static_range(0, COUNT, AT_ONCE):
        x = tl.load(base + (offsets + first)[:, None] + tl.arange(0, AT_ONCE)[None])
        numbers += channels_of(x.to(tl.float32), AT_ONCE)
    return numbers


@triton.jit
def load_channels(base, offsets, COUNT: tl.constexpr):
    """As ``load_numbers``, in fewer instructions; of bfloat16 the first is at an even place."""
    if base.dtype.element_ty == tl.bfloat16:
        # Two at once: a word is the bits of the second in float32, and of the first below them.
        words = base.to(tl.pointer_type(tl.int32), bitcast=True) + (offsets >> 1)[:, None]
        words = channels_of(tl.load(words + tl.arange(0, COUNT // 2)[None]), COUNT // 2)
        channels = ()
        for i in tl.static_range(COUNT // 2):
            channels += ((words[i] << 16).to(tl.float32, bitcast=True),)
            channels += ((words[i] & -65536).to(tl.float32, bitcast=True),)
    else:
        channels = load_numbers(base, offsets, COUNT)
    return channels


@triton.jit
def joined(channels, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """What ``channels_of`` took apart."""
    parts = ()
    for i in tl.static_range(COUNT):
        x = channels[FIRST + i]
        parts += (tl.reshape(x, [x.shape[0], 1]),)
    for level in tl.static_range((COUNT > 1) + (COUNT > 2) + (COUNT > 4)):
        halves = parts
        parts = ()
        for i in tl.static_range(COUNT // 2 ** (level + 1)):
            both = tl.permute(tl.join(halves[2 * i], halves[2 * i + 1]), (0, 2, 1))
            parts += (tl.reshape(both, [both.shape[0], 2 ** (level + 1)]),)
    return parts[0]


@triton.jit
def store_channels(base, offsets, channels, inside, COUNT: tl.constexpr):
    """COUNT numbers from these offsets (threads,) on, where they are inside the map."""
    MOST: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth  # 16 bytes
    AT_ONCE: tl.constexpr = COUNT if COUNT < MOST else MOST
    for first in tl.static_range(0, COUNT, AT_ONCE):
        pointers = base + (offsets + first)[:, None] + tl.arange(0, AT_ONCE)[None]
        x = convert(joined(channels, first, AT_ONCE), base.dtype.element_ty)
        tl.store(pointers, x, inside[:, None])


@triton.jit
def column_logits(
    strip,
    starts,
    col,
    width,
    rel_cols,
    embeddings,
    HALF: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    STRIP: tl.constexpr,
):
    """Of each query of a strip its ``start`` and its columns' part of q . r, for each offset.

    That is minus infinity outside of the map. A head's embeddings begin at ``embeddings``; where
    there are none at all, ``rel_cols`` is None.
    """
    logits = repeat((), STRIP)
    for offset in tl.static_range(KERNEL_SIZE):
        if rel_cols is not None:
            embedding = load_numbers(rel_cols, embeddings + offset * HALF, HALF)
        added = ()
        for i in tl.static_range(STRIP):
            logit = starts[i]
            if rel_cols is not None:
                logit = product(part_of(strip[i], HALF, HALF), embedding, logit, HALF)
            inside = within(col + (i + offset - KERNEL_SIZE // 2), width)
            added += (logits[i] + (tl.where(inside, logit, float("-inf")),),)
        logits = added
    return logits


@triton.jit
def row_logits(strip, inside, rel_rows, embedding, HALF: tl.constexpr, STRIP: tl.constexpr):
    """Of each query of a strip its row's part of q . r, minus infinity outside of the map."""
    if rel_rows is not None:
        numbers = load_numbers(rel_rows, embedding, HALF)
    logits = ()
    for i in tl.static_range(STRIP):
        logit = tl.zeros(inside.shape, tl.float32)
        if rel_rows is not None:
            logit = product(strip[i], numbers, logit, HALF)
        logits += (tl.where(inside, logit, float("-inf")),)
    return logits


@triton.jit
def weigh_row(
    logits, of_row, maximum, total, result, KERNEL_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """The weights of a row of keys, and what the online softmax has with them.

    ``of_row`` is to be added to the logits; ``result`` is only scaled to the new maximum.
    """
    largest = logits[0]
    for offset in tl.static_range(1, KERNEL_SIZE):
        largest = tl.maximum(largest, logits[offset])
    largest = tl.maximum(maximum, largest + of_row)
    rescale = tl.exp2(maximum - largest)
    total *= rescale
    weights = ()
    for offset in tl.static_range(KERNEL_SIZE):
        weight = tl.exp2(logits[offset] - (largest - of_row))
        total += weight
        weights += (weight,)
    return weights, largest, total, scale(result, rescale, HEAD_DIM)


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
    KERNEL_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STRIP: tl.constexpr,
):
    """A tile of queries of HEADS heads. In all else as the other forward kernel."""
    RADIUS: tl.constexpr = KERNEL_SIZE // 2
    HALF: tl.constexpr = HEAD_DIM // 2
    n, first_head, start, height, width, head, row, col = threads_of(
        levels, height, width, LEVELS, NUM_HEADS, HEADS, BLOCK_H, BLOCK_W, STRIP
    )
    channel = head * HEAD_DIM
    zeros = tl.zeros(row.shape, tl.float32)
    base = base_of(query, query_strides, n, start, first_head, HEAD_DIM)
    q = ()
    for i in tl.static_range(STRIP):
        position = nearest(row, col + i, height, width)
        channels = load_channels(base, position * query_strides[1] + channel, HEAD_DIM)
        q += (scale(channels, LOG2_E, HEAD_DIM),)
    embeddings = (first_head + head) * (KERNEL_SIZE * HALF)
    starts = repeat(zeros, STRIP)
    col_logits = column_logits(
        q, starts, col, width, rel_cols, embeddings, HALF, KERNEL_SIZE, STRIP
    )

    key_base = base_of(key, key_strides, n, start, first_head, HEAD_DIM)
    value_base = base_of(value, key_strides, n, start, first_head, HEAD_DIM)
    maximum, total = repeat(zeros + LOWEST, STRIP), repeat(zeros, STRIP)
    result = repeat(repeat(zeros, HEAD_DIM), STRIP)
    for r in range(KERNEL_SIZE):
        key_row = row + (r - RADIUS)
        inside = within(key_row, height)
        of_row = row_logits(q, inside, rel_rows, embeddings + r * HALF, HALF, STRIP)
        logits = repeat((), STRIP)
        for j in tl.static_range(STRIP + KERNEL_SIZE - 1):
            position = nearest(key_row, col + (j - RADIUS), height, width)
            k = load_channels(key_base, position * key_strides[1] + channel, HEAD_DIM)
            added = ()
            for i in tl.static_range(STRIP):
                of_query = logits[i]
                if j >= i and j - i < KERNEL_SIZE:
                    of_query += (product(q[i], k, col_logits[i][j - i], HEAD_DIM),)
                added += (of_query,)
            logits = added

        weights, new_maximum, new_total, rescaled = (), (), (), ()
        for i in tl.static_range(STRIP):
            of_query, largest, weight_sum, of_result = weigh_row(
                logits[i], of_row[i], maximum[i], total[i], result[i], KERNEL_SIZE, HEAD_DIM
            )
            weights += (of_query,)
            new_maximum += (largest,)
            new_total += (weight_sum,)
            rescaled += (of_result,)
        maximum, total, result = new_maximum, new_total, rescaled

        for j in tl.static_range(STRIP + KERNEL_SIZE - 1):
            position = nearest(key_row, col + (j - RADIUS), height, width)
            v = load_channels(value_base, position * key_strides[1] + channel, HEAD_DIM)
            added = ()
            for i in tl.static_range(STRIP):
                of_query = result[i]
                if j >= i and j - i < KERNEL_SIZE:
                    of_query = add_scaled(of_query, weights[i][j - i], v, HEAD_DIM)
                added += (of_query,)
            result = added

    plane = (n.to(tl.int64) * NUM_HEADS + first_head) * positions + start
    for i in tl.static_range(STRIP):
        inside = (row < height) & (col + i < width)
        log_total = log2(total[i])
        mean = scale(result[i], tl.exp2(-log_total), HEAD_DIM)
        position = row * width + col + i
        offsets = position * output_strides[1] + channel
        if output is not None:
            base = base_of(output, output_strides, n, start, first_head, HEAD_DIM)
            store_channels(base, offsets, mean, inside, HEAD_DIM)
        if residual is not None:
            near = nearest(row, col + i, height, width)
            base = base_of(residual, residual_strides, n, start, first_head, HEAD_DIM)
            x = load_channels(base, near * residual_strides[1] + channel, HEAD_DIM)
            sums = ()
            for c in tl.static_range(HEAD_DIM):
                # Rounded first, as the output is from which the backward adds it up again.
                rounded = convert(mean[c], query.dtype.element_ty).to(tl.float32)
                sums += (rounded + x[c],)
            base = base_of(added_up, output_strides, n, start, first_head, HEAD_DIM)
            store_channels(base, offsets, sums, inside, HEAD_DIM)
        position += head * positions
        tl.store(logsumexp + plane + position, (maximum[i] + log_total) * LN_2, inside)
