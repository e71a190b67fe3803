"""The backward's kernel of ``stem_attention_pooled``."""

# The compiler unrolls the loops in which tuples grow.
# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl

from .kernels import LOWEST
from .stem_kernels import load_pixel, locate, weigh, weights_of_head
from .tuples import add_scaled, product, repeat


@triton.jit
def attend(query, keys, starts, from_col, inside, CHANNELS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The attention weights of a query, of the keys of each row.

    ``keys`` are projected, of their first channels, then of their second ones; ``starts`` what
    their logits begin with.
    """
    logits, weights = (), ()
    for j in tl.static_range(BLOCK_SIZE):
        logit = weigh(query, from_col + j * CHANNELS, starts[j], CHANNELS)
        for i in tl.static_range(CHANNELS):
            logit += query[i] * keys[i * BLOCK_SIZE + j]
        logits += (logit,)
    largest = logits[0]
    for j in tl.static_range(1, BLOCK_SIZE):
        largest = tl.maximum(largest, logits[j])
    largest = tl.max(largest, 1)[:, None]
    weight_sum = 0.0
    for j in tl.static_range(BLOCK_SIZE):
        weight = tl.exp2(logits[j] - largest)
        weight_sum += weight
        weights += (weight,)
    # A query beyond the border has no weights, and so no part in any gradient.
    scale = tl.where(inside, 1.0 / tl.sum(weight_sum, 1)[:, None], 0.0)
    scaled = ()
    for j in tl.static_range(BLOCK_SIZE):
        scaled += (weights[j] * scale,)
    return scaled


@triton.jit
def load_outputs_gradient(
    grad_maximum,
    grad_sum,
    positions,
    strides,
    n,
    row,
    col,
    exists,
    down,
    across,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """What arrives for each channel of the head where its maximum is, and where that is."""
    head = tl.program_id(0)
    CHUNKS: tl.constexpr = (HEAD_DIM + CHANNELS - 1) // CHANNELS
    pointers = grad_maximum + n * strides[0] + head * HEAD_DIM * strides[1]
    pointers += row * strides[2] + col * strides[3]
    words = positions + (n * tl.num_programs(0) + head) * CHUNKS * down * across
    words += row * across + col
    grads, packed, highest_at = (), (), ()
    for chunk in tl.static_range(CHUNKS):
        packed += (tl.load(words + chunk * down * across, exists, 0),)
    for d in tl.static_range(HEAD_DIM):
        grad = tl.load(pointers + d * strides[1], exists, 0.0).to(tl.float32)
        grads += (grad + tl.load(grad_sum + d),)
        highest_at += (packed[d // CHANNELS] >> 4 * (d % 8) & 15,)
    return grads, highest_at


@triton.jit
def weigh_outputs(
    weights,
    values,
    grads,
    highest_at,
    grad_sum,
    twice_grad_square_sum,
    grad_values,
    COLUMN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The gradients of a query's weights, and ``grad_values`` with what it adds to them.

    Its output's gradient is ``grads`` where the maximum is in its column, else ``grad_sum``; and
    what arrives for the sum of squares.
    """
    grad_weights, new_grad_values = repeat(weights[0] * 0.0, BLOCK_SIZE), ()
    for d in tl.static_range(HEAD_DIM):
        value = ()
        for j in tl.static_range(BLOCK_SIZE):
            value += (values[d * BLOCK_SIZE + j],)
        output = tl.sum(product(weights, value, 0.0, BLOCK_SIZE), 1)[:, None]
        grad = tl.where(highest_at[d] == COLUMN, grads[d], tl.load(grad_sum + d))
        grad += tl.load(twice_grad_square_sum + d) * output
        grad_weights = add_scaled(grad_weights, grad, value, BLOCK_SIZE)
        for j in tl.static_range(BLOCK_SIZE):
            new_grad_values += (grad_values[d * BLOCK_SIZE + j] + weights[j] * grad,)
    return grad_weights, new_grad_values


@triton.jit
def store_sums(pointers, sums, COUNT: tl.constexpr):
    """Those of all blocks, of each row of keys."""
    for i in tl.static_range(COUNT):
        tl.store(pointers + i, tl.sum(sums[i], 0))


@triton.jit
def project_keys(
    pixels,
    content,
    value_weights,
    key_row,
    IN_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Projected keys, of their first channels, then of their second ones; and so the values."""
    keys, values = (), ()
    for i in tl.static_range(IN_CHANNELS):
        for j in tl.static_range(BLOCK_SIZE):
            keys += (weigh(pixels[j], content + i * IN_CHANNELS, 0.0, IN_CHANNELS),)
    for d in tl.static_range(HEAD_DIM):
        for j in tl.static_range(BLOCK_SIZE):
            number = value_weights + ((key_row * BLOCK_SIZE + j) * HEAD_DIM + d) * IN_CHANNELS
            values += (weigh(pixels[j], number, 0.0, IN_CHANNELS),)
    return keys, values


@triton.jit
def add_query(
    of_content,
    of_row,
    of_cols,
    query,
    grad_logits,
    pixels,
    COLUMN: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The sums with what a query in this column of its block adds to them."""
    total, new_of_cols, new_of_content = grad_logits[0], (), ()
    for j in tl.static_range(1, BLOCK_SIZE):
        total += grad_logits[j]
    for offset in tl.static_range(2 * BLOCK_SIZE - 1):
        for i in tl.static_range(IN_CHANNELS):
            x = of_cols[offset * IN_CHANNELS + i]
            if offset >= BLOCK_SIZE - 1 - COLUMN and offset < 2 * BLOCK_SIZE - 1 - COLUMN:
                x += query[i] * grad_logits[offset + COLUMN - BLOCK_SIZE + 1]
            new_of_cols += (x,)
    of_keys = ()
    for k in tl.static_range(IN_CHANNELS):
        x = grad_logits[0] * pixels[0][k]
        for j in tl.static_range(1, BLOCK_SIZE):
            x += grad_logits[j] * pixels[j][k]
        of_keys += (x,)
    for i in tl.static_range(IN_CHANNELS):
        for k in tl.static_range(IN_CHANNELS):
            new_of_content += (of_content[i * IN_CHANNELS + k] + query[i] * of_keys[k],)
    return new_of_content, add_scaled(of_row, total, query, IN_CHANNELS), new_of_cols


@triton.jit
def add_row(of_rows, of_row, IN_CHANNELS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """``of_row`` added to the first row, which comes last then.

    After as many rows as there are, all are in their places: registers cannot be chosen by number.
    """
    new_of_rows = ()
    for i in tl.static_range(IN_CHANNELS, BLOCK_SIZE * IN_CHANNELS):
        new_of_rows += (of_rows[i],)
    for i in tl.static_range(IN_CHANNELS):
        new_of_rows += (of_rows[i] + of_row[i],)
    return new_of_rows


@triton.jit
def add_values(
    of_values,
    pixels,
    grad_values,
    IN_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The sums with what the values of a block add to them."""
    new_of_values = ()
    for j in tl.static_range(BLOCK_SIZE):
        for d in tl.static_range(HEAD_DIM):
            for i in tl.static_range(IN_CHANNELS):
                x = of_values[(j * HEAD_DIM + d) * IN_CHANNELS + i]
                new_of_values += (x + pixels[j][i] * grad_values[d * BLOCK_SIZE + j],)
    return new_of_values


@triton.jit(do_not_specialize=["num_images", "height", "width"])
def pooled_backward_kernel(
    image,
    content,
    rel_rows,
    rel_cols,
    value_weights,
    positions,
    grad_maximum,
    grad_sum,
    twice_grad_square_sum,
    sums,
    image_strides,
    grad_maximum_strides,
    num_images,
    height,
    width,
    IN_CHANNELS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Many blocks of one head; writes this program's sums (programs, heads, KEY_ROWS, numbers).

    The numbers are gradients of content, row embeddings, column embeddings and values' weights, the
    last for the key row, the others to be summed up over the key rows.

    Every tensor is (BLOCKS, KEY_ROWS), and tuples go through columns and channels: a thread has the
    keys of a row of its block for itself, and asks those of the other rows for the maximum and the
    sums of the softmax and for the output only.
    """
    POSITIONS: tl.constexpr = BLOCK_SIZE * BLOCK_SIZE
    OFFSETS: tl.constexpr = 2 * BLOCK_SIZE - 1
    head = tl.program_id(0)
    content, rel_rows, rel_cols = weights_of_head(
        head, content, rel_rows, rel_cols, IN_CHANNELS, BLOCK_SIZE
    )
    value_weights += head * POSITIONS * HEAD_DIM * IN_CHANNELS
    grad_sum += head * HEAD_DIM
    twice_grad_square_sum += head * HEAD_DIM
    across, down = tl.cdiv(width, BLOCK_SIZE), tl.cdiv(height, BLOCK_SIZE)
    num_blocks = num_images * down * across
    key_row = tl.arange(0, KEY_ROWS)[None]
    read_row = tl.minimum(key_row, BLOCK_SIZE - 1)  # where there is none, its pixels are zeros
    zeros = tl.zeros([BLOCKS, KEY_ROWS], tl.float32)
    of_content = repeat(zeros, IN_CHANNELS * IN_CHANNELS)
    of_rows = repeat(zeros, BLOCK_SIZE * IN_CHANNELS)  # by row of the query
    of_cols = repeat(zeros, OFFSETS * IN_CHANNELS)
    of_values = repeat(zeros, BLOCK_SIZE * HEAD_DIM * IN_CHANNELS)

    for tile in range(tl.program_id(1), tl.cdiv(num_blocks, BLOCKS), tl.num_programs(1)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)[:, None] + key_row * 0
        exists = block < num_blocks
        n, row, col, corner, rows, cols = locate(
            block, image, image_strides, height, width, BLOCK_SIZE
        )
        grads, highest_at = load_outputs_gradient(
            grad_maximum,
            grad_sum,
            positions,
            grad_maximum_strides,
            n,
            row,
            col,
            exists,
            down,
            across,
            HEAD_DIM,
            CHANNELS,
        )
        pixels, starts = (), ()
        for j in tl.static_range(BLOCK_SIZE):
            key_inside = exists & (key_row < tl.minimum(rows, BLOCK_SIZE)) & (j < cols)
            pixels += (load_pixel(corner, key_row, j, key_inside, image_strides, IN_CHANNELS),)
            # Finite, because blocks beyond the border have no key at all.
            starts += (tl.where(key_inside, 0.0, LOWEST),)
        projected, values = project_keys(
            pixels, content, value_weights, read_row, IN_CHANNELS, HEAD_DIM, BLOCK_SIZE
        )
        grad_values = repeat(zeros, BLOCK_SIZE * HEAD_DIM)

        for r in range(BLOCK_SIZE):
            keys, of_row = (), repeat(zeros, IN_CHANNELS)
            for i in tl.static_range(IN_CHANNELS):
                from_row = tl.load(rel_rows + (read_row - r + BLOCK_SIZE - 1) * IN_CHANNELS + i)
                for j in tl.static_range(BLOCK_SIZE):
                    keys += (projected[i * BLOCK_SIZE + j] + from_row,)
            in_row = ()
            for d in tl.static_range(HEAD_DIM):
                in_row += (highest_at[d] ^ (4 * r),)
            for c in tl.static_range(BLOCK_SIZE):
                inside = exists & (r < rows) & (c < cols)
                query = load_pixel(corner, r, c, inside, image_strides, IN_CHANNELS)
                from_col = rel_cols + (BLOCK_SIZE - 1 - c) * IN_CHANNELS
                weights = attend(query, keys, starts, from_col, inside, IN_CHANNELS, BLOCK_SIZE)
                grad_weights, grad_values = weigh_outputs(
                    weights,
                    values,
                    grads,
                    in_row,
                    grad_sum,
                    twice_grad_square_sum,
                    grad_values,
                    c,
                    HEAD_DIM,
                    BLOCK_SIZE,
                )
                mean = tl.sum(product(weights, grad_weights, 0.0, BLOCK_SIZE), 1)[:, None]
                grad_logits = ()
                for j in tl.static_range(BLOCK_SIZE):
                    grad_logits += (weights[j] * (grad_weights[j] - mean),)
                of_content, of_row, of_cols = add_query(
                    of_content,
                    of_row,
                    of_cols,
                    query,
                    grad_logits,
                    pixels,
                    c,
                    IN_CHANNELS,
                    BLOCK_SIZE,
                )
            of_rows = add_row(of_rows, of_row, IN_CHANNELS, BLOCK_SIZE)
        of_values = add_values(of_values, pixels, grad_values, IN_CHANNELS, HEAD_DIM, BLOCK_SIZE)

    NUMBERS: tl.constexpr = (IN_CHANNELS + 2 * OFFSETS + BLOCK_SIZE * HEAD_DIM) * IN_CHANNELS
    key_row = tl.arange(0, KEY_ROWS)
    program = tl.program_id(1) * tl.num_programs(0) + head
    sums += (program * KEY_ROWS + key_row) * NUMBERS
    store_sums(sums, of_content, IN_CHANNELS * IN_CHANNELS)
    sums += IN_CHANNELS * IN_CHANNELS
    for r in tl.static_range(OFFSETS):
        # Offsets that no query has from this row of keys are zeros.
        offset = (key_row - r + BLOCK_SIZE - 1 + OFFSETS) % OFFSETS
        for i in tl.static_range(IN_CHANNELS):
            x = of_rows[r * IN_CHANNELS + i] if r < BLOCK_SIZE else zeros
            tl.store(sums + offset * IN_CHANNELS + i, tl.sum(x, 0))
    sums += OFFSETS * IN_CHANNELS
    store_sums(sums, of_cols, OFFSETS * IN_CHANNELS)
    store_sums(sums + OFFSETS * IN_CHANNELS, of_values, BLOCK_SIZE * HEAD_DIM * IN_CHANNELS)
