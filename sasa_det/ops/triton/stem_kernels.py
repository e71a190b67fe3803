"""The forward's kernel of ``stem_attention_pooled``, and what it shares with the backward's.

Parameters are folded, see folded_stem.py; logits and what makes them are in units of log 2.
"""

# The compiler unrolls the loops in which tuples grow.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .kernels import LOWEST, convert
from .tuples import repeat


@triton.jit
def weights_of_head(
    head,
    content,
    rel_rows,
    rel_cols,
    IN_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    offset = head * (2 * BLOCK_SIZE - 1) * IN_CHANNELS
    return content + head * IN_CHANNELS * IN_CHANNELS, rel_rows + offset, rel_cols + offset


@triton.jit
def locate(block, image, strides, height, width, BLOCK_SIZE: tl.constexpr):
    """Of blocks: image, row, column; their first position, and rows and columns from there on."""
    across, down = tl.cdiv(width, BLOCK_SIZE), tl.cdiv(height, BLOCK_SIZE)
    n, row, col = (block // across // down).to(tl.int64), block // across % down, block % across
    corner = image + n * strides[0]
    corner += row * BLOCK_SIZE * strides[2] + col * BLOCK_SIZE * strides[3]
    return n, row, col, corner, height - row * BLOCK_SIZE, width - col * BLOCK_SIZE


@triton.jit
def load_pixel(corner, row, col, inside, strides, IN_CHANNELS: tl.constexpr):
    """The channels of a position of each block, IN_CHANNELS times (B,) in float32."""
    pointers = corner + row * strides[2] + col * strides[3]
    pixel = ()
    for i in tl.static_range(IN_CHANNELS):
        pixel += (tl.load(pointers + i * strides[1], inside, 0.0).to(tl.float32),)
    return pixel


@triton.jit
def weigh(pixel, weights, start, IN_CHANNELS: tl.constexpr, STRIDE: tl.constexpr = 1):
    """``start`` and each channel of the pixel times its number in ``weights``."""
    for i in tl.static_range(IN_CHANNELS):
        start += pixel[i] * tl.load(weights + i * STRIDE)
    return start


@triton.jit
def weigh_keys(
    query, keys, content, by_row, by_col, IN_CHANNELS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The attention weights of a query but for their sum, and that sum.

    Of its position a key adds its row's number and its column's.
    """
    projected, logits, weights = (), (), ()
    for i in tl.static_range(IN_CHANNELS):
        projected += (weigh(query, content + i, 0.0, IN_CHANNELS, IN_CHANNELS),)
    for key in tl.static_range(BLOCK_SIZE * BLOCK_SIZE):
        logit = by_row[key // BLOCK_SIZE] + by_col[key % BLOCK_SIZE]
        for i in tl.static_range(IN_CHANNELS):
            logit += projected[i] * keys[key][i]
        logits += (logit,)
    largest = logits[0]
    for key in tl.static_range(1, BLOCK_SIZE * BLOCK_SIZE):
        largest = tl.maximum(largest, logits[key])
    for key in tl.static_range(BLOCK_SIZE * BLOCK_SIZE):
        weights += (tl.exp2(logits[key] - largest),)
    weight_sum = weights[0]
    for key in tl.static_range(1, BLOCK_SIZE * BLOCK_SIZE):
        weight_sum += weights[key]
    return weights, weight_sum


@triton.jit(do_not_specialize=["num_images", "height", "width"])
def pooled_forward_kernel(
    image,
    content,
    rel_rows,
    rel_cols,
    value_weights,
    maximum,
    partial_sums,
    positions,
    image_strides,
    num_images,
    height,
    width,
    IN_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Many blocks, and CHANNELS of the channels of one head.

    Writes ``maximum`` (N, C, rows, columns of blocks) and this program's sums of the output and of
    its squares, ``partial_sums`` (programs, 2, C). Or, for the backward, ``positions`` instead
    (N, heads * chunks, rows, columns): where the maxima are, of channel d of a head in
    bits 4 * (d % 8) and up, four times the row and the column.

    Every tensor is (BLOCKS,), and tuples go through positions and channels: a thread has its block
    for itself, and neither maxima nor sums nor products need another thread's registers.
    """
    CHUNKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    POSITIONS: tl.constexpr = BLOCK_SIZE * BLOCK_SIZE
    head, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    out_channels = tl.num_programs(0) // CHUNKS * HEAD_DIM
    # The last chunk may share channels with the one before it: both write the same.
    first_channel = head * HEAD_DIM + tl.minimum(chunk * CHANNELS, HEAD_DIM - CHANNELS)
    content, rel_rows, rel_cols = weights_of_head(
        head, content, rel_rows, rel_cols, IN_CHANNELS, BLOCK_SIZE
    )
    value_weights += (head * (POSITIONS - 1) * HEAD_DIM + first_channel) * IN_CHANNELS
    across, down = tl.cdiv(width, BLOCK_SIZE), tl.cdiv(height, BLOCK_SIZE)
    num_blocks = num_images * down * across
    zeros = tl.zeros([BLOCKS], tl.float32)
    total = repeat(zeros, CHANNELS)
    square_total = total

    for tile in range(tl.program_id(1), tl.cdiv(num_blocks, BLOCKS), tl.num_programs(1)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        exists = block < num_blocks
        n, row, col, corner, rows, cols = locate(
            block, image, image_strides, height, width, BLOCK_SIZE
        )
        highest, highest_at = repeat(zeros + float("-inf"), CHANNELS), repeat(block * 0, CHANNELS)
        pixels, values = (), ()
        for key in tl.static_range(POSITIONS):
            key_row, key_col = key // BLOCK_SIZE, key % BLOCK_SIZE
            key_inside = exists & (key_row < rows) & (key_col < cols)
            pixel = load_pixel(corner, key_row, key_col, key_inside, image_strides, IN_CHANNELS)
            pixels += (pixel,)
        for d in tl.static_range(CHANNELS):
            for key in tl.static_range(POSITIONS):
                number = value_weights + (key * HEAD_DIM + d) * IN_CHANNELS
                values += (weigh(pixels[key], number, 0.0, IN_CHANNELS),)

        for position in range(POSITIONS):
            r, c = position // BLOCK_SIZE, position % BLOCK_SIZE
            inside = exists & (r < rows) & (c < cols)
            query = load_pixel(corner, r, c, inside, image_strides, IN_CHANNELS)
            from_row = rel_rows + (BLOCK_SIZE - 1 - r) * IN_CHANNELS
            from_col = rel_cols + (BLOCK_SIZE - 1 - c) * IN_CHANNELS
            by_row, by_col = (), ()
            for i in tl.static_range(BLOCK_SIZE):
                # Keys beyond the border start low; finite, because a key may be beyond two.
                start = tl.where(i < rows, 0.0, LOWEST)
                by_row += (weigh(query, from_row + i * IN_CHANNELS, start, IN_CHANNELS),)
                start = tl.where(i < cols, 0.0, LOWEST)
                by_col += (weigh(query, from_col + i * IN_CHANNELS, start, IN_CHANNELS),)
            weights, weight_sum = weigh_keys(
                query, pixels, content, by_row, by_col, IN_CHANNELS, BLOCK_SIZE
            )
            scale = tl.where(inside, 1.0 / weight_sum, 0.0)
            new_highest, new_highest_at, new_total, new_square_total = (), (), (), ()
            for d in tl.static_range(CHANNELS):
                result = weights[0] * values[d * POSITIONS]
                for key in tl.static_range(1, POSITIONS):
                    result += weights[key] * values[d * POSITIONS + key]
                result *= scale
                counted = tl.where(inside, result, float("-inf"))
                # Of equal maxima the first one gets the gradient.
                new_highest_at += (tl.where(counted > highest[d], 4 * r + c, highest_at[d]),)
                new_highest += (tl.maximum(highest[d], counted),)
                new_total += (total[d] + result,)
                new_square_total += (square_total[d] + result * result,)
            highest, highest_at = new_highest, new_highest_at
            total, square_total = new_total, new_square_total

        place = row * across + col
        if positions is None:
            place += (n * out_channels + first_channel) * down * across
            for d in tl.static_range(CHANNELS):
                rounded = convert(highest[d], maximum.dtype.element_ty)
                tl.store(maximum + place + d * down * across, rounded, exists)
        else:
            packed = block * 0
            for d in tl.static_range(CHANNELS):
                packed |= highest_at[d] << 4 * ((first_channel - head * HEAD_DIM + d) % 8)
            place += (n * tl.num_programs(0) + tl.program_id(0)) * down * across
            tl.store(positions + place, packed, exists)

    if positions is None:
        store_sums(partial_sums, total, square_total, first_channel, out_channels, CHANNELS)


@triton.jit
def store_sums(partial_sums, total, square_total, first_channel, channels, CHANNELS: tl.constexpr):
    """This program's, summed up over its blocks, from this channel on."""
    sums = partial_sums + tl.program_id(1) * 2 * channels + first_channel
    for d in tl.static_range(CHANNELS):
        tl.store(sums + d, tl.sum(total[d], 0))
        tl.store(sums + channels + d, tl.sum(square_total[d], 0))
