"""The kernels of ``group_norm_relu``.

A program works on some tiles of one image, one after another. In shapes P stands for the positions
of a tile, G and D for GROUPS_PAD and DIM_PAD, the groups and their channels; K for CHUNKS_PAD, the
programs of an image. A group's statistics are its mean and its sum of squared deviations: sums of
squares would lose the variance of a map whose mean is large.
"""

import triton
import triton.language as tl

from .kernels import convert


@triton.jit
def tile_at(
    first,
    positions,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """(P, G, D) offsets into an image whose channels are last, and which of them are inside it."""
    position = first + tl.arange(0, BLOCK)
    channel, channel_mask = channels(GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    offsets = (position * (GROUPS * DIM))[:, None, None] + channel[None]
    return offsets, (position < positions)[:, None, None] & channel_mask[None]


@triton.jit
def channels(
    GROUPS: tl.constexpr, DIM: tl.constexpr, GROUPS_PAD: tl.constexpr, DIM_PAD: tl.constexpr
):
    """(G, D) channels, and which of them there are."""
    group, within = tl.arange(0, GROUPS_PAD)[:, None], tl.arange(0, DIM_PAD)[None]
    return group * DIM + within, (group < GROUPS) & (within < DIM)


@triton.jit
def load_parameters(
    weight,
    bias,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """(1, G, D) each, in float32."""
    channel, mask = channels(GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    w = tl.load(weight + channel, mask, 0.0).to(tl.float32)
    b = tl.load(bias + channel, mask, 0.0).to(tl.float32)
    return w[None], b[None]


@triton.jit
def load_statistics(
    statistics,
    n,
    chunks,
    positions_of_chunk,
    positions,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """(G,) means, sums of squared deviations and reciprocal standard deviations of an image."""
    chunk, group = tl.arange(0, CHUNKS_PAD)[:, None], tl.arange(0, GROUPS_PAD)[None]
    mask = (chunk < chunks) & (group < GROUPS)
    pointers = statistics + (n * chunks + chunk) * (2 * GROUPS) + group
    means = tl.load(pointers, mask, 0.0)
    deviations = tl.load(pointers + GROUPS, mask, 0.0)
    count = (positions * DIM).to(tl.float32)
    if CHUNKS_PAD == 1:  # exactly what was put together before, so that all outputs are the same
        mean, deviation = tl.sum(means, 0), tl.sum(deviations, 0)
    else:
        counts = tl.minimum(positions - chunk * positions_of_chunk, positions_of_chunk)
        counts = tl.where(mask, counts * DIM, 0).to(tl.float32)
        mean = tl.sum(means * counts, 0) / count
        between = means - mean[None]
        deviation = tl.sum(deviations + counts * between * between, 0)
    return mean, deviation, 1.0 / tl.sqrt(deviation / count + eps)


@triton.jit(do_not_specialize=["positions", "tiles"])
def statistics_kernel(
    x,
    statistics,
    positions,
    tiles,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Statistics of the groups over the tiles of a program."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    x += n.to(tl.int64) * positions * (GROUPS * DIM)
    total = tl.zeros([1], tl.float32)
    mean = tl.zeros([GROUPS_PAD], tl.float32)
    deviation = tl.zeros([GROUPS_PAD], tl.float32)
    first = chunk * tiles * BLOCK
    for start in range(first, tl.minimum(first + tiles * BLOCK, positions), BLOCK):
        offsets, mask = tile_at(start, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        values = tl.load(x + offsets, mask, 0.0).to(tl.float32)
        count = (tl.minimum(positions - start, BLOCK) * DIM).to(tl.float32)
        tile_mean = tl.sum(tl.sum(values, 2), 0) / count
        centred = tl.where(mask, values - tile_mean[None, :, None], 0.0)
        tile_deviation = tl.sum(tl.sum(centred * centred, 2), 0)
        between = tile_mean - mean
        share = count / (total + count)
        mean += between * share
        deviation += tile_deviation + between * between * (share * total)
        total += count
    group = tl.arange(0, GROUPS_PAD)
    pointers = statistics + (n * tl.num_programs(0) + chunk) * (2 * GROUPS) + group
    tl.store(pointers, mean, group < GROUPS)
    tl.store(pointers + GROUPS, deviation, group < GROUPS)


@triton.jit(do_not_specialize=["positions", "tiles", "chunks", "positions_of_chunk"])
def forward_kernel(
    x,
    weight,
    bias,
    statistics,
    output,
    statistics_of_image,
    positions,
    tiles,
    chunks,
    positions_of_chunk,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """The output of the tiles of a program, from the statistics of all chunks of the image."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    mean, deviation, scale = load_statistics(
        statistics, n, chunks, positions_of_chunk, positions, eps,
        GROUPS, DIM, GROUPS_PAD, CHUNKS_PAD,
    )  # fmt: skip
    if chunk == 0:
        group = tl.arange(0, GROUPS_PAD)
        pointers = statistics_of_image + n * (2 * GROUPS) + group
        tl.store(pointers, mean, group < GROUPS)
        tl.store(pointers + GROUPS, deviation, group < GROUPS)
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    image = n.to(tl.int64) * positions * (GROUPS * DIM)
    first = chunk * tiles * BLOCK
    for start in range(first, tl.minimum(first + tiles * BLOCK, positions), BLOCK):
        offsets, mask = tile_at(start, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        values = tl.load(x + image + offsets, mask, 0.0).to(tl.float32)
        normed = (values - mean[None, :, None]) * scale[None, :, None]
        result = tl.maximum(normed * w + b, 0.0)
        tl.store(output + image + offsets, convert(result, output.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["positions", "tiles"])
def gradient_sums_kernel(
    grad_output,
    x,
    weight,
    bias,
    statistics,
    channel_sums,
    group_sums,
    positions,
    tiles,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Of the gradient of what ReLU is given, and of its product with the normalised input: the sums
    over the tiles of a program, by channel; weighted and summed up by group as well."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    mean, _, scale = load_statistics(
        statistics, n, 1, positions, positions, eps, GROUPS, DIM, GROUPS_PAD, 1
    )
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    image = n.to(tl.int64) * positions * (GROUPS * DIM)
    of_bias = tl.zeros([GROUPS_PAD, DIM_PAD], tl.float32)
    of_weight = tl.zeros([GROUPS_PAD, DIM_PAD], tl.float32)
    first = chunk * tiles * BLOCK
    for start in range(first, tl.minimum(first + tiles * BLOCK, positions), BLOCK):
        offsets, mask = tile_at(start, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        values = tl.load(x + image + offsets, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_output + image + offsets, mask, 0.0).to(tl.float32)
        normed = (values - mean[None, :, None]) * scale[None, :, None]
        grad = tl.where(normed * w + b > 0.0, grad, 0.0)
        of_bias += tl.sum(grad, 0)
        of_weight += tl.sum(grad * normed, 0)
    program = n * tl.num_programs(0) + chunk
    channel, mask = channels(GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    pointers = channel_sums + program * (2 * GROUPS * DIM) + channel
    tl.store(pointers, of_weight, mask)
    tl.store(pointers + GROUPS * DIM, of_bias, mask)
    group = tl.arange(0, GROUPS_PAD)
    pointers = group_sums + program * (2 * GROUPS) + group
    w = tl.sum(w, 0)  # (G, D)
    tl.store(pointers, tl.sum(of_weight * w, 1), group < GROUPS)
    tl.store(pointers + GROUPS, tl.sum(of_bias * w, 1), group < GROUPS)


@triton.jit(do_not_specialize=["positions", "tiles", "chunks"])
def input_gradient_kernel(
    grad_output,
    x,
    weight,
    bias,
    statistics,
    group_sums,
    grad_input,
    positions,
    tiles,
    chunks,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """The input's gradient at the tiles of a program, from the sums of all chunks of the image."""
    chunk, n = tl.program_id(0), tl.program_id(1)
    mean, _, scale = load_statistics(
        statistics, n, 1, positions, positions, eps, GROUPS, DIM, GROUPS_PAD, 1
    )
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    other, group = tl.arange(0, CHUNKS_PAD)[:, None], tl.arange(0, GROUPS_PAD)[None]
    sums_mask = (other < chunks) & (group < GROUPS)
    pointers = group_sums + (n * chunks + other) * (2 * GROUPS) + group
    count = (positions * DIM).to(tl.float32)
    along = tl.sum(tl.load(pointers, sums_mask, 0.0), 0) / count
    average = tl.sum(tl.load(pointers + GROUPS, sums_mask, 0.0), 0) / count
    image = n.to(tl.int64) * positions * (GROUPS * DIM)
    first = chunk * tiles * BLOCK
    for start in range(first, tl.minimum(first + tiles * BLOCK, positions), BLOCK):
        offsets, mask = tile_at(start, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        values = tl.load(x + image + offsets, mask, 0.0).to(tl.float32)
        grad = tl.load(grad_output + image + offsets, mask, 0.0).to(tl.float32)
        normed = (values - mean[None, :, None]) * scale[None, :, None]
        grad = tl.where(normed * w + b > 0.0, grad * w, 0.0)
        grad -= average[None, :, None] + normed * along[None, :, None]
        result = grad * scale[None, :, None]
        tl.store(grad_input + image + offsets, convert(result, grad_input.dtype.element_ty), mask)
