"""The kernels of ``stem_attention_pooled``.

In shapes B stands for BLOCKS, the blocks worked on at once, P for the 16 positions of a block and D
for PADDED_DIM. Smaller blocks leave positions unused in the backward, and fewer channels than three
are zeros there. Queries come last in its shapes, because then a thread has most of a query's keys
in its own registers and need not ask others for their maximum and sum.
"""

# The compiler unrolls the loops in which tuples grow.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .kernels import LOWEST, convert


@triton.jit
def locate(tile, height, width, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """A tile is BLOCKS blocks side by side: its image, its row of blocks, their columns (B,)."""
    # Plain numbers as far as possible: what a whole tile shares costs next to nothing.
    down = tl.cdiv(height, BLOCK_SIZE)
    tiles_across = tl.cdiv(tl.cdiv(width, BLOCK_SIZE), BLOCKS)
    row = tile // tiles_across
    cols = tile % tiles_across * BLOCKS + tl.arange(0, BLOCKS)
    return row // down, row % down, cols


@triton.jit
def load_pixels(
    image,
    strides,
    n,
    row,
    block_cols,
    height,
    width,
    IN_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Whether the image reaches each position (B, P), and three times (B, P) in float32."""
    position = tl.arange(0, 16)[None]
    rows = row * BLOCK_SIZE + position // BLOCK_SIZE
    cols = block_cols[:, None] * BLOCK_SIZE + position % BLOCK_SIZE
    inside = (position < BLOCK_SIZE * BLOCK_SIZE) & (rows < height) & (cols < width)
    pointers = image + n.to(tl.int64) * strides[0] + (rows * strides[2] + cols * strides[3])
    x0 = tl.load(pointers, inside, 0.0).to(tl.float32)
    x1 = tl.load(pointers + strides[1], inside & (IN_CHANNELS > 1), 0.0).to(tl.float32)
    x2 = tl.load(pointers + 2 * strides[1], inside & (IN_CHANNELS > 2), 0.0).to(tl.float32)
    return inside, x0, x1, x2


@triton.jit
def load_matrices(base, head, ROWS: tl.constexpr):
    """Three times (1, ROWS, P), one for each channel, of (heads, 3, ROWS, P)."""
    index = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None]
    base += head * 3 * ROWS * 16
    x0 = tl.load(base + index)
    x1 = tl.load(base + ROWS * 16 + index)
    x2 = tl.load(base + 2 * ROWS * 16 + index)
    return x0[None], x1[None], x2[None]


@triton.jit
def store_matrices(base, program, x0, x1, x2, ROWS: tl.constexpr):
    """Three times (B, ROWS, P), summed over the blocks, to (programs, 3, ROWS, P)."""
    index = tl.arange(0, ROWS)[:, None] * 16 + tl.arange(0, 16)[None]
    base += program * 3 * ROWS * 16
    tl.store(base + index, tl.sum(x0, 0))
    tl.store(base + ROWS * 16 + index, tl.sum(x1, 0))
    tl.store(base + 2 * ROWS * 16 + index, tl.sum(x2, 0))


@triton.jit
def attend(x0, x1, x2, inside, products, relative, value_weight):
    """The attention weights (B, P keys, P queries) and the values (B, D, P).

    A query is three numbers times a matrix, and so is a key: their product is the pixel times a
    3 x 3 matrix times the other pixel. ``products`` and ``relative`` are in units of log 2.
    """
    r0, r1, r2 = relative
    key0 = tl.load(products) * x0 + tl.load(products + 1) * x1 + tl.load(products + 2) * x2
    key1 = tl.load(products + 3) * x0 + tl.load(products + 4) * x1 + tl.load(products + 5) * x2
    key2 = tl.load(products + 6) * x0 + tl.load(products + 7) * x1 + tl.load(products + 8) * x2
    logits = x0[:, None, :] * (key0[:, :, None] + r0)
    logits += x1[:, None, :] * (key1[:, :, None] + r1)
    logits += x2[:, None, :] * (key2[:, :, None] + r2)
    # Finite, because blocks beyond the border have no key at all.
    logits = tl.where(inside[:, :, None], logits, LOWEST)
    weights = tl.exp2(logits - tl.max(logits, 1)[:, None, :])
    weights *= (1.0 / tl.sum(weights, 1))[:, None, :]
    v0, v1, v2 = value_weight
    value = x0[:, None, :] * v0 + x1[:, None, :] * v1 + x2[:, None, :] * v2
    return weights, value


@triton.jit
def load_pixel(corner, row, col, inside, strides, IN_CHANNELS: tl.constexpr):
    """The channels of a position of each block, IN_CHANNELS times (B,) in float32."""
    pointers = corner + row * strides[2] + col * strides[3]
    pixel = ()
    for i in tl.static_range(IN_CHANNELS):
        pixel += (tl.load(pointers + i * strides[1], inside, 0.0).to(tl.float32),)
    return pixel


@triton.jit
def weigh(pixel, weights, start, IN_CHANNELS: tl.constexpr):
    """``start`` and each channel of the pixel times its number in ``weights``."""
    for i in tl.static_range(IN_CHANNELS):
        start += pixel[i] * tl.load(weights + i)
    return start


@triton.jit
def weigh_keys(
    query, keys, products, by_row, by_col, IN_CHANNELS: tl.constexpr, BLOCK_SIZE: tl.constexpr
):
    """The attention weights of a query but for their sum, and that sum.

    The logits are in units of log 2; of its position a key adds its row's number and its column's.
    """
    projected, logits, weights = (), (), ()
    for i in tl.static_range(IN_CHANNELS):
        projected += (weigh(query, products + i * IN_CHANNELS, 0.0, IN_CHANNELS),)
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
    products,
    relative,
    value_weight,
    maximum,
    partial_sums,
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
    its squares, ``partial_sums`` (programs, 2, C).

    Every tensor is (BLOCKS,), and tuples go through positions and channels: a thread has its block
    for itself, and neither maxima nor sums nor products need another thread's registers.
    """
    CHUNKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    POSITIONS: tl.constexpr = BLOCK_SIZE * BLOCK_SIZE
    OFFSETS: tl.constexpr = 2 * BLOCK_SIZE - 1
    head, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    out_channels = tl.num_programs(0) // CHUNKS * HEAD_DIM
    # The last chunk may share channels with the one before it: both write the same.
    first_channel = head * HEAD_DIM + tl.minimum(chunk * CHANNELS, HEAD_DIM - CHANNELS)
    products += head * IN_CHANNELS * IN_CHANNELS
    relative_rows = relative + head * 2 * OFFSETS * IN_CHANNELS
    relative_cols = relative_rows + OFFSETS * IN_CHANNELS
    value_weight += first_channel * POSITIONS * IN_CHANNELS
    across, down = tl.cdiv(width, BLOCK_SIZE), tl.cdiv(height, BLOCK_SIZE)
    num_blocks = num_images * down * across
    zeros = tl.zeros([BLOCKS], tl.float32)
    total = ()
    for _ in tl.static_range(CHANNELS):
        total += (zeros,)
    square_total = total

    for tile in range(tl.program_id(1), tl.cdiv(num_blocks, BLOCKS), tl.num_programs(1)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        exists = block < num_blocks
        n, row, col = block // across // down, block // across % down, block % across
        rows, cols = height - row * BLOCK_SIZE, width - col * BLOCK_SIZE  # to the image's end
        corner = image + n.to(tl.int64) * image_strides[0]
        corner += row * BLOCK_SIZE * image_strides[2] + col * BLOCK_SIZE * image_strides[3]
        pixels, values, highest = (), (), ()
        for key in tl.static_range(POSITIONS):
            key_row, key_col = key // BLOCK_SIZE, key % BLOCK_SIZE
            key_inside = exists & (key_row < rows) & (key_col < cols)
            pixel = load_pixel(corner, key_row, key_col, key_inside, image_strides, IN_CHANNELS)
            pixels += (pixel,)
        for d in tl.static_range(CHANNELS):
            highest += (zeros + float("-inf"),)
            for key in tl.static_range(POSITIONS):
                number = value_weight + (d * POSITIONS + key) * IN_CHANNELS
                values += (weigh(pixels[key], number, 0.0, IN_CHANNELS),)

        for position in range(POSITIONS):
            r, c = position // BLOCK_SIZE, position % BLOCK_SIZE
            inside = exists & (r < rows) & (c < cols)
            query = load_pixel(corner, r, c, inside, image_strides, IN_CHANNELS)
            from_row = relative_rows + (BLOCK_SIZE - 1 - r) * IN_CHANNELS
            from_col = relative_cols + (BLOCK_SIZE - 1 - c) * IN_CHANNELS
            by_row, by_col = (), ()
            for i in tl.static_range(BLOCK_SIZE):
                # Keys beyond the border start low; finite, because a key may be beyond two.
                start = tl.where(i < rows, 0.0, LOWEST)
                by_row += (weigh(query, from_row + i * IN_CHANNELS, start, IN_CHANNELS),)
                start = tl.where(i < cols, 0.0, LOWEST)
                by_col += (weigh(query, from_col + i * IN_CHANNELS, start, IN_CHANNELS),)
            weights, weight_sum = weigh_keys(
                query, pixels, products, by_row, by_col, IN_CHANNELS, BLOCK_SIZE
            )
            scale = tl.where(inside, 1.0 / weight_sum, 0.0)
            new_highest, new_total, new_square_total = (), (), ()
            for d in tl.static_range(CHANNELS):
                result = weights[0] * values[d * POSITIONS]
                for key in tl.static_range(1, POSITIONS):
                    result += weights[key] * values[d * POSITIONS + key]
                result *= scale
                counted = tl.where(inside, result, float("-inf"))
                new_highest += (tl.maximum(highest[d], counted),)
                new_total += (total[d] + result,)
                new_square_total += (square_total[d] + result * result,)
            highest, total, square_total = new_highest, new_total, new_square_total

        pointers = maximum + (n.to(tl.int64) * out_channels + first_channel) * down * across
        pointers += row * across + col
        for d in tl.static_range(CHANNELS):
            rounded = convert(highest[d], maximum.dtype.element_ty)
            tl.store(pointers + d * down * across, rounded, exists)

    sums = partial_sums + tl.program_id(1) * 2 * out_channels + first_channel
    for d in tl.static_range(CHANNELS):
        tl.store(sums + d, tl.sum(total[d], 0))
        tl.store(sums + out_channels + d, tl.sum(square_total[d], 0))


@triton.jit
def output_gradient(result, inside, grad_maximum, grad_sum, grad_square_sum):
    """(B, D, P) from what arrives for the maxima (B, D), the sums and the sums of squares (D,)."""
    candidates = tl.where(inside[:, None, :], result, float("-inf"))
    is_highest = candidates == tl.max(candidates, 2)[:, :, None]
    position = tl.arange(0, 16)[None, None]
    # Of equal maxima the first one gets the gradient.
    first = tl.min(tl.where(is_highest, position, 16), 2)
    grad = grad_sum[None, :, None] + 2.0 * grad_square_sum[None, :, None] * result
    grad += tl.where(position == first[:, :, None], grad_maximum[:, :, None], 0.0)
    return tl.where(inside[:, None, :], grad, 0.0)


@triton.jit
def deepen(x):
    """(B, D, P) to (B, 2 * D, P), every other channel zeros."""
    pairs = tl.permute(tl.join(x, tl.zeros_like(x)), (0, 1, 3, 2))
    return tl.reshape(pairs, (x.shape[0], 2 * x.shape[1], x.shape[2]))


@triton.jit(do_not_specialize=["num_images", "height", "width"])
def pooled_backward_kernel(
    image,
    products,
    relative,
    value_weight,
    grad_maximum,
    grad_sum,
    grad_square_sum,
    grad_products,
    grad_relative,
    grad_value_weight,
    image_strides,
    grad_maximum_strides,
    num_images,
    height,
    width,
    IN_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Many blocks of one head; writes this program's sums, each gradient (programs, heads, ...)."""
    head, num_heads = tl.program_id(0), tl.num_programs(0)
    across, down = tl.cdiv(width, BLOCK_SIZE), tl.cdiv(height, BLOCK_SIZE)
    channel = tl.arange(0, PADDED_DIM)
    out_channel = head * HEAD_DIM + channel
    channel_mask = channel < HEAD_DIM
    grad_of_sum = tl.load(grad_sum + out_channel, channel_mask, 0.0).to(tl.float32)
    grad_of_square = tl.load(grad_square_sum + out_channel, channel_mask, 0.0).to(tl.float32)
    relative_weights = load_matrices(relative, head, 16)
    value_weights = load_matrices(value_weight, head, PADDED_DIM)
    # For each channel of the query's pixel: sums of the gradients of logits, with each channel of
    # the key's pixel (the rows; the fourth is unused) and by pair; of the values, by channel.
    p0 = tl.zeros([BLOCKS, 4, 16], tl.float32)
    p1, p2 = p0, p0
    r0 = tl.zeros([BLOCKS, 16, 16], tl.float32)
    r1, r2 = r0, r0
    v0 = tl.zeros([BLOCKS, PADDED_DIM, 16], tl.float32)
    v1, v2 = v0, v0
    tiles = num_images * down * tl.cdiv(across, BLOCKS)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        n, row, cols = locate(tile, height, width, BLOCKS, BLOCK_SIZE)
        inside, x0, x1, x2 = load_pixels(
            image, image_strides, n, row, cols, height, width, IN_CHANNELS, BLOCK_SIZE
        )
        weights, value = attend(
            x0, x1, x2, inside, products + head * 9, relative_weights, value_weights
        )
        result = tl.dot(value, weights, input_precision="ieee")
        pointers = grad_maximum + n.to(tl.int64) * grad_maximum_strides[0]
        pointers += row * grad_maximum_strides[2] + (cols * grad_maximum_strides[3])[:, None]
        pointers += (out_channel * grad_maximum_strides[1])[None]
        mask = channel_mask[None] & (cols < across)[:, None]
        grad_of_maximum = tl.load(pointers, mask, 0.0).to(tl.float32)
        grad = output_gradient(result, inside, grad_of_maximum, grad_of_sum, grad_of_square)
        grad_value = tl.dot(grad, tl.trans(weights, 0, 2, 1), input_precision="ieee")
        if PADDED_DIM < 16:  # the least depth of a product
            value, grad = deepen(value), deepen(grad)
        grad_weights = tl.dot(tl.trans(value, 0, 2, 1), grad, input_precision="ieee")
        grad_logits = weights * (grad_weights - tl.sum(weights * grad_weights, 1)[:, None, :])

        v0 += x0[:, None, :] * grad_value
        v1 += x1[:, None, :] * grad_value
        v2 += x2[:, None, :] * grad_value
        r0 += x0[:, None, :] * grad_logits
        r1 += x1[:, None, :] * grad_logits
        r2 += x2[:, None, :] * grad_logits
        key0 = tl.sum(x0[:, :, None] * grad_logits, 1)[:, None, :]
        key1 = tl.sum(x1[:, :, None] * grad_logits, 1)[:, None, :]
        key2 = tl.sum(x2[:, :, None] * grad_logits, 1)[:, None, :]
        row = tl.arange(0, 4)[None, :, None]
        keys = tl.where(row == 0, key0, tl.where(row == 1, key1, tl.where(row == 2, key2, 0.0)))
        p0 += x0[:, None, :] * keys
        p1 += x1[:, None, :] * keys
        p2 += x2[:, None, :] * keys
    program = tl.program_id(1) * num_heads + head
    store_matrices(grad_products, program, p0, p1, p2, 4)
    store_matrices(grad_relative, program, r0, r1, r2, 16)
    store_matrices(grad_value_weight, program, v0, v1, v2, PADDED_DIM)
