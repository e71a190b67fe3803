"""How many FLOPs the operators are: a multiply and an add are two, exponentials are not counted.

Two ways to count. *Executed*: what the operator needs; q . r factorises into a row and a column
part, k * C multiply-adds a position (the eager path spends more on small maps, where it computes
all pairs). *Dense* (``dense=True``): as Eq. 3 of the paper is written, k * k * C for q . r, and in
the stem M value projections followed by their mixture. The paper's tables count dense. One value
projection alone is not mixed.
"""

from collections.abc import Sequence
from math import prod


def local_attention_flops(
    query_shape: Sequence[int], kernel_size: int, *, relative: bool, dense: bool = False
) -> int:
    """q . k, q . r and the weighted sum of the values; borders are counted as if not clipped."""
    window = kernel_size**2
    per_channel = 2 * window
    if relative:
        per_channel += window if dense else kernel_size
    return 2 * prod(query_shape) * per_channel


def local_attention_backward_flops(
    query_shape: Sequence[int], kernel_size: int, *, relative: bool
) -> int:
    """q . k anew, and one product each for the gradients of weights, query, key and value."""
    per_channel = 5 * kernel_size**2
    if relative:
        per_channel += 3 * kernel_size  # q . r anew, the gradients of q and of the embeddings
    return 2 * prod(query_shape) * per_channel


def projection_flops(x_shape: Sequence[int], weight_shape: Sequence[int]) -> int:
    """Of a 1x1 convolution."""
    n, in_channels, height, width = x_shape
    return 2 * n * height * width * in_channels * weight_shape[0]


def stem_attention_flops(
    image_shape: Sequence[int],
    query_weight_shape: Sequence[int],
    mixture_shape: Sequence[int],
    *,
    relative: bool,
    dense: bool = False,
) -> int:
    """Projections and attention in the blocks; each position meets all B * B of its block."""
    n, in_channels, height, width = image_shape
    out_channels = query_weight_shape[0]
    num_mixtures, block_size, _ = mixture_shape
    window = block_size**2
    value_projections = num_mixtures if dense else 1
    per_position = (2 + value_projections) * in_channels * out_channels
    per_position += 2 * window * out_channels
    if dense and num_mixtures > 1:
        per_position += num_mixtures * out_channels  # the mixture of the projected values
    if relative:
        per_position += window * out_channels
    mixture_of_weights = window * num_mixtures * out_channels * in_channels
    if dense or num_mixtures == 1:
        mixture_of_weights = 0
    return 2 * (n * height * width * per_position + mixture_of_weights)
