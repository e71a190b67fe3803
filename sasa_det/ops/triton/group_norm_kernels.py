"""The kernels of ``group_norm_relu``.

A program works on some tiles of one map, one after another. An image may have several maps, one
behind the other, each with statistics of its own. In shapes P stands for the positions of a tile, G
and D for GROUPS_PAD and DIM_PAD, the groups and their channels; K for CHUNKS_PAD, the programs of a
map. A group's statistics are its mean and its sum of squared deviations: sums of squares would lose
the variance of a map whose mean is large.
"""

import triton
import triton.language as tl

from .kernels import convert, find_level


@triton.jit
def share_of_program(
    levels,
    all_positions,
    positions,
    tiles,
    chunks,
    LEVELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a program works on.

    If there are several maps, ``levels`` has of each its first chunk, its first position, its
    number of positions, the tiles of each of its chunks, and how many these are.

    Returns:
        The row of its map among all maps, and that of the map's first chunk among all chunks;
        where the map begins; its positions, those of each of its chunks, and how many these are;
        the first position of the program's own chunk.
    """
    n, index = tl.program_id(1), tl.program_id(0)
    level, first_chunk, start = 0, 0, 0
    if LEVELS > 1:
        level = find_level(index, levels, 5, LEVELS)
        levels += 5 * level
        first_chunk, start = tl.load(levels), tl.load(levels + 1)
        positions, tiles, chunks = tl.load(levels + 2), tl.load(levels + 3), tl.load(levels + 4)
    map_row, chunk_row = n * LEVELS + level, n * tl.num_programs(0) + first_chunk
    base = (n.to(tl.int64) * all_positions + start) * CHANNELS
    of_chunk = tiles * BLOCK
    return map_row, chunk_row, base, positions, of_chunk, chunks, (index - first_chunk) * of_chunk


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
    """(P, G, D) offsets into a map whose channels are last, and which of them are inside it."""
    position = first + tl.arange(0, BLOCK)
    channel, channel_mask = channels(GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    offsets = (position * (GROUPS * DIM))[:, None, None] + channel[None]
    return offsets, (position < positions)[:, None, None] & channel_mask[None]


@triton.jit
def load_normed(pointers, mask, mean, scale):
    """(P, G, D) in float32."""
    values = tl.load(pointers, mask, 0.0).to(tl.float32)
    return (values - mean[None, :, None]) * scale[None, :, None]


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
    first,
    chunks,
    positions_of_chunk,
    positions,
    eps,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """(G,) means, sums of squared deviations and reciprocal standard deviations of a map, whose
    chunks are in the rows of ``statistics`` from ``first`` on."""
    chunk, group = tl.arange(0, CHUNKS_PAD)[:, None], tl.arange(0, GROUPS_PAD)[None]
    mask = (chunk < chunks) & (group < GROUPS)
    pointers = statistics + (first + chunk) * (2 * GROUPS) + group
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


@triton.jit(do_not_specialize=["all_positions", "positions", "tiles", "chunks"])
def statistics_kernel(
    x,
    statistics,
    levels,
    all_positions,
    positions,
    tiles,
    chunks,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Statistics of the groups over the tiles of a program."""
    _, _, base, positions, of_chunk, _, first = share_of_program(
        levels, all_positions, positions, tiles, chunks, LEVELS, GROUPS * DIM, BLOCK
    )
    total = tl.zeros([1], tl.float32)
    mean = tl.zeros([GROUPS_PAD], tl.float32)
    deviation = tl.zeros([GROUPS_PAD], tl.float32)
    for top in range(first, tl.minimum(first + of_chunk, positions), BLOCK):
        offsets, mask = tile_at(top, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        values = tl.load(x + base + offsets, mask, 0.0).to(tl.float32)
        count = (tl.minimum(positions - top, BLOCK) * DIM).to(tl.float32)
        tile_mean = tl.sum(tl.sum(values, 2), 0) / count
        centred = tl.where(mask, values - tile_mean[None, :, None], 0.0)
        tile_deviation = tl.sum(tl.sum(centred * centred, 2), 0)
        between = tile_mean - mean
        share = count / (total + count)
        mean += between * share
        deviation += tile_deviation + between * between * (share * total)
        total += count
    group = tl.arange(0, GROUPS_PAD)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    pointers = statistics + program * (2 * GROUPS) + group
    tl.store(pointers, mean, group < GROUPS)
    tl.store(pointers + GROUPS, deviation, group < GROUPS)


@triton.jit(do_not_specialize=["all_positions", "positions", "tiles", "chunks"])
def forward_kernel(
    x,
    weight,
    bias,
    statistics,
    output,
    statistics_of_map,
    levels,
    all_positions,
    positions,
    tiles,
    chunks,
    eps,
    LEVELS: tl.constexpr,
    OF_CHUNKS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """The output of the tiles of a program, from the statistics of its map or of all its chunks."""
    map_row, chunk_row, base, positions, of_chunk, chunks, first = share_of_program(
        levels, all_positions, positions, tiles, chunks, LEVELS, GROUPS * DIM, BLOCK
    )
    if OF_CHUNKS:
        rows, positions_of_row = chunk_row, of_chunk
    else:
        rows, positions_of_row, chunks = map_row, positions, 1
    mean, deviation, scale = load_statistics(
        statistics, rows, chunks, positions_of_row, positions, eps,
        GROUPS, DIM, GROUPS_PAD, CHUNKS_PAD,
    )  # fmt: skip
    if OF_CHUNKS and first == 0:
        group = tl.arange(0, GROUPS_PAD)
        pointers = statistics_of_map + map_row * (2 * GROUPS) + group
        tl.store(pointers, mean, group < GROUPS)
        tl.store(pointers + GROUPS, deviation, group < GROUPS)
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    for top in range(first, tl.minimum(first + of_chunk, positions), BLOCK):
        offsets, mask = tile_at(top, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        normed = load_normed(x + base + offsets, mask, mean, scale)
        result = normed * w + b
        result = tl.where(result <= 0.0, 0.0, result)  # NaN stays NaN
        tl.store(output + base + offsets, convert(result, output.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["all_positions", "positions", "tiles", "chunks"])
def gradient_sums_kernel(
    grad_output,
    x,
    weight,
    bias,
    statistics,
    channel_sums,
    group_sums,
    levels,
    all_positions,
    positions,
    tiles,
    chunks,
    eps,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
):
    """Of the gradient of what ReLU is given, and of its product with the normalised input: the sums
    over the tiles of a program, by channel; weighted and summed up by group as well."""
    map_row, _, base, positions, of_chunk, _, first = share_of_program(
        levels, all_positions, positions, tiles, chunks, LEVELS, GROUPS * DIM, BLOCK
    )
    mean, _, scale = load_statistics(
        statistics, map_row, 1, positions, positions, eps, GROUPS, DIM, GROUPS_PAD, 1
    )
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    # Summed up over positions at the end: until then each thread has its own.
    of_bias = tl.zeros([BLOCK, GROUPS_PAD, DIM_PAD], tl.float32)
    of_weight = tl.zeros([BLOCK, GROUPS_PAD, DIM_PAD], tl.float32)
    for top in range(first, tl.minimum(first + of_chunk, positions), BLOCK):
        offsets, mask = tile_at(top, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        normed = load_normed(x + base + offsets, mask, mean, scale)
        grad = tl.load(grad_output + base + offsets, mask, 0.0).to(tl.float32)
        grad = tl.where(normed * w + b <= 0.0, 0.0, grad)
        of_bias += grad
        of_weight += grad * normed
    of_bias, of_weight = tl.sum(of_bias, 0), tl.sum(of_weight, 0)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    channel, mask = channels(GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    pointers = channel_sums + program.to(tl.int64) * (2 * GROUPS * DIM) + channel
    tl.store(pointers, of_weight, mask)
    tl.store(pointers + GROUPS * DIM, of_bias, mask)
    group = tl.arange(0, GROUPS_PAD)
    pointers = group_sums + program * (2 * GROUPS) + group
    w = tl.sum(w, 0)  # (G, D)
    tl.store(pointers, tl.sum(of_weight * w, 1), group < GROUPS)
    tl.store(pointers + GROUPS, tl.sum(of_bias * w, 1), group < GROUPS)


@triton.jit(do_not_specialize=["all_positions", "positions", "tiles", "chunks"])
def input_gradient_kernel(
    grad_output,
    x,
    weight,
    bias,
    statistics,
    group_sums,
    grad_residual,
    grad_input,
    levels,
    all_positions,
    positions,
    tiles,
    chunks,
    eps,
    LEVELS: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    DIM_PAD: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
):
    """The input's gradient at the tiles of a program, from the sums of all chunks of its map.

    ``grad_residual`` is added to it, where the input has another gradient as well; else it is None.
    """
    map_row, chunk_row, base, positions, of_chunk, chunks, first = share_of_program(
        levels, all_positions, positions, tiles, chunks, LEVELS, GROUPS * DIM, BLOCK
    )
    mean, _, scale = load_statistics(
        statistics, map_row, 1, positions, positions, eps, GROUPS, DIM, GROUPS_PAD, 1
    )
    w, b = load_parameters(weight, bias, GROUPS, DIM, GROUPS_PAD, DIM_PAD)
    other, group = tl.arange(0, CHUNKS_PAD)[:, None], tl.arange(0, GROUPS_PAD)[None]
    sums_mask = (other < chunks) & (group < GROUPS)
    pointers = group_sums + (chunk_row + other) * (2 * GROUPS) + group
    count = (positions * DIM).to(tl.float32)
    along = tl.sum(tl.load(pointers, sums_mask, 0.0), 0) / count
    average = tl.sum(tl.load(pointers + GROUPS, sums_mask, 0.0), 0) / count
    for top in range(first, tl.minimum(first + of_chunk, positions), BLOCK):
        offsets, mask = tile_at(top, positions, GROUPS, DIM, BLOCK, GROUPS_PAD, DIM_PAD)
        normed = load_normed(x + base + offsets, mask, mean, scale)
        grad = tl.load(grad_output + base + offsets, mask, 0.0).to(tl.float32)
        grad = tl.where(normed * w + b <= 0.0, 0.0, grad * w)
        grad -= average[None, :, None] + normed * along[None, :, None]
        result = grad * scale[None, :, None]
        if grad_residual is not None:
            result += tl.load(grad_residual + base + offsets, mask, 0.0).to(tl.float32)
        tl.store(grad_input + base + offsets, convert(result, grad_input.dtype.element_ty), mask)
