"""The public functions: argument checks and autocast around the registered operators."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import eager, eager_stem, registration
from .calls import AttentionCall, StemCall, compute_dtype
from .checks import check_attention, check_embeddings, check_heads, check_map, check_tensor
from .operator import autocast_is_on, makes_a_program, shows_steps


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    r"""Stand-alone local self-attention with relative positions, Eq. 3 of arXiv 1906.05909.

    For every head and every position (i, j),

    .. math::
        y_{ij} = \sum_{(a,b) \in N_k(i,j)}
            \mathrm{softmax}_{ab}(q_{ij} \cdot k_{ab} + q_{ij} \cdot r_{a-i,\,b-j})\, v_{ab},
        \qquad r_{a-i,\,b-j} = [\,\mathrm{rel\_rows}_{a-i},\ \mathrm{rel\_cols}_{b-j}\,]

    where N_k is the k x k window centred on (i, j) and clipped at the border: positions outside
    the map take no part in the softmax. There is no hidden scale; whoever computes the queries
    decides on one. Gradients reach all five tensors.

    Args:
        query, key, value (Tensor[N, C, H, W]): C = num_heads * head_dim, the channels of a head
            contiguous, head_dim even; float32, float64, bfloat16 or float16, all alike; contiguous,
            channels_last or any other strides; any H, W >= 1.
        rel_rows, rel_cols (Tensor[num_heads, kernel_size, head_dim // 2] or None): embeddings of
            the row and of the column offset, index 0 being the offset -(kernel_size // 2). The
            first half of a head's query channels meets ``rel_rows``, the second ``rel_cols``. In
            the dtype of ``query``, or float32 with bfloat16 and float16 ones. Both None: attention
            by content only.
        num_heads (int): how many heads share the channels.
        kernel_size (int): side k of the window, odd.

    Returns:
        Tensor[N, C, H, W]: in the dtype and the memory format of ``query``. bfloat16 and float16
        are computed in float32 inside. Under autocast query, key and value are cast first, unless
        they are float64.
        On x86 the native kernels take numbers below 1.2e-38 for zeros.

    Raises:
        ValueError: if the shapes, dtypes or devices do not fit together.

    Example::

        >>> q, k, v = torch.randn(3, 2, 64, 20, 30)
        >>> rel_rows, rel_cols = torch.randn(2, 8, 7, 4)
        >>> local_attention(q, k, v, rel_rows, rel_cols, num_heads=8, kernel_size=7).shape
        torch.Size([2, 64, 20, 30])
    """
    query, key, value = cast_for_autocast(query, key, value)
    rel_rows, rel_cols = cast_embeddings(query, rel_rows, rel_cols)
    check_attention(AttentionCall(query, key, value, rel_rows, rel_cols, num_heads, kernel_size))
    output, _ = registration.local_attention_op(
        query, key, value, rel_rows, rel_cols, num_heads, kernel_size
    )
    return output


def local_attention_weights(
    query: Tensor,
    key: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    kernel_size: int,
) -> Tensor:
    """The softmax of :func:`local_attention` itself, for looking at it; takes k*k times its memory.

    Args:
        query, key, rel_rows, rel_cols, num_heads, kernel_size: as in :func:`local_attention`.

    Returns:
        Tensor[N, num_heads, kernel_size ** 2, H, W]: float32 (float64 for float64 queries); the
        window row by row from its top left; zero where it leaves the map. Not differentiable.
    """
    query, key = cast_for_autocast(query, key)
    rel_rows, rel_cols = cast_embeddings(query, rel_rows, rel_cols)
    call = AttentionCall(query, key, key, rel_rows, rel_cols, num_heads, kernel_size)
    check_attention(call)
    with torch.no_grad():
        return eager.weights(call)


def stem_attention(
    image: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weights: Tensor,
    mixture: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
) -> Tensor:
    r"""Attention of the stem: Eq. 3 inside non-overlapping blocks, values spatially mixed.

    Section 3.3 of arXiv 1906.05909. The image is cut into B x B blocks from the top left corner;
    a position attends to the positions of its own block, and the value of the pixel x_ab is

    .. math:: v_{ab} = \Bigl(\sum_m p(a, b, m)\, W_V^m\Bigr) x_{ab}

    with (a, b) the position inside its block. Blocks that reach over the bottom or the right
    border are clipped there. From the few channels of the image to the attention's output this is
    one operator, because queries, keys and values at full resolution are what costs memory: none
    of them is kept for the backward.

    Args:
        image (Tensor[N, C_in, H, W]): any H, W >= 1.
        query_weight, key_weight (Tensor[C, C_in]): projections; C = num_heads * head_dim.
        value_weights (Tensor[M, C, C_in]): W_V^m, the M value projections.
        mixture (Tensor[M, B, B]): p(a, b, m), which sum to one over m; B is the block's side.
        rel_rows, rel_cols (Tensor[num_heads, 2 * B - 1, head_dim // 2] or None): as in
            :func:`local_attention`, index 0 being the offset -(B - 1).
        num_heads (int): how many heads share the C channels.

    Returns:
        Tensor[N, C, H, W]: in the dtype of ``image``.

    Raises:
        ValueError: if the shapes, dtypes or devices do not fit together.
    """
    tensors = (image, query_weight, key_weight, value_weights, mixture, rel_rows, rel_cols)
    return registration.stem_attention_op(*_stem_call(tensors, num_heads))


def stem_attention_weights(
    image: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
    block_size: int,
) -> Tensor:
    """The softmax of :func:`stem_attention` itself, for looking at it; B * B times its memory.

    Args:
        image, query_weight, key_weight, rel_rows, rel_cols, num_heads: as in
            :func:`stem_attention`.
        block_size (int): the block's side B.

    Returns:
        Tensor[N, num_heads, block_size ** 2, H, W]: float32 (float64 for float64 images); for each
        position the positions of its block row by row from the top left; zero where the block
        leaves the image. Not differentiable.
    """
    with torch.no_grad():
        # The weights do not depend on the values.
        value_weights = key_weight[None]
        mixture = key_weight.new_ones(1, block_size, block_size)
        tensors = (image, query_weight, key_weight, value_weights, mixture, rel_rows, rel_cols)
        return eager_stem.weights(_stem_call(tensors, num_heads))


def stem_attention_pooled(
    image: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    value_weights: Tensor,
    mixture: Tensor,
    rel_rows: Tensor | None,
    rel_cols: Tensor | None,
    *,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What batch norm, ReLU and max pooling need of :func:`stem_attention`, without its output.

    At full resolution the output is the largest tensor of a whole detector. Batch norm needs its
    mean and its variance; a scale by a positive factor, a shift and ReLU are monotonic, so they can
    as well be applied to the maximum.

    Args:
        image: needs no gradient, and gets none.
        query_weight, key_weight, value_weights, mixture, rel_rows, rel_cols, num_heads: as in
            :func:`stem_attention`.

    Returns:
        tuple[Tensor, Tensor, Tensor]: of the output, its maximum in each block (N, C, ceil(H / B),
        ceil(W / B)), in the dtype of ``image``; its sum (C,) and the sum of its squares (C,) over
        all positions, float32 (float64 for float64 images).

    Raises:
        ValueError: if the shapes, dtypes or devices do not fit together, or if the image needs a
            gradient.
    """
    if image.requires_grad:
        raise ValueError(
            "stem_attention_pooled computes no gradient of the image, but the image needs one; "
            "use stem_attention, or detach the image."
        )
    tensors = (image, query_weight, key_weight, value_weights, mixture, rel_rows, rel_cols)
    return registration.stem_attention_pooled_op(*_stem_call(tensors, num_heads))


def _stem_call(tensors: tuple[Tensor | None, ...], num_heads: int) -> StemCall:
    """The arguments cast for autocast, and checked."""
    call = StemCall(*(*cast_for_autocast(*tensors), num_heads))
    check_map("image", call.image)
    in_channels, out_channels = call.image.shape[1], call.query_weight.shape[0]
    head_dim = check_heads(out_channels, num_heads)
    num_mixtures, block_size = call.mixture.shape[0], call.mixture.shape[-1]
    expected = {
        "query_weight": (out_channels, in_channels),
        "key_weight": (out_channels, in_channels),
        "value_weights": (num_mixtures, out_channels, in_channels),
        "mixture": (num_mixtures, block_size, block_size),
    }
    for name, shape in expected.items():
        check_tensor(name, getattr(call, name), shape, like=call.image)
    embeddings = (num_heads, 2 * block_size - 1, head_dim // 2)
    check_embeddings(call.rel_rows, call.rel_cols, embeddings, like=call.image)
    return call


def is_inference(x: Tensor) -> bool:
    """Whether what is made of ``x`` needs no gradient, no autocast, and nobody to see its steps."""
    return not (torch.is_grad_enabled() or shows_steps() or autocast_is_on(x.device.type))


def cast_for_autocast(first: Any, *others: Tensor | None) -> tuple[Any, ...]:
    """As autocast does for a convolution: everything but float64 goes to the autocast dtype."""
    device_type = first.device.type
    if not autocast_is_on(device_type):
        return first, *others
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(_cast(t, dtype) for t in (first, *others))


def cast_embeddings(query: Tensor, *embeddings: Tensor | None) -> tuple[Tensor | None, ...]:
    """As they are where they may be, beside a query that autocast has seen to: the kernels read
    float32 too, and add up their gradients in it."""
    if any(e is None or e.dtype == compute_dtype(query.dtype) for e in embeddings):
        return embeddings
    return cast_for_autocast(query, *embeddings)[1:]


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or t.dtype in (dtype, torch.float64):
        return t
    casts = getattr(_shared, "casts", None)
    if casts is None or not isinstance(t, torch.nn.Parameter):
        return t.to(dtype)
    # What was cast without gradients is none for those who need them.
    key = id(t), dtype, torch.is_grad_enabled()
    if key not in casts:
        casts[key] = t, t.to(dtype)  # the parameter, too, so that no other one gets its id
    return casts[key][1]


# Each thread has its own: replicas of a model may run in several.
_shared = threading.local()


@contextmanager
def shared_casts() -> Iterator[None]:
    """Within it autocast casts each parameter of our operators once, and not at each call.

    For modules that are called several times in a forward. Autocast itself remembers the weights of
    convolutions for as long as it is on; our operators do not learn when that ends.
    """
    if makes_a_program() or getattr(_shared, "casts", None) is not None:
        yield
        return
    _shared.casts = {}
    try:
        yield
    finally:
        _shared.casts = None
