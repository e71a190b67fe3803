"""What a backend is handed: the arguments of one call of an operator, already checked."""

from typing import NamedTuple

import torch
from torch import Tensor

# In bytes. glibc asks the system anew for each larger block, whose pages are mapped one by one as
# they are written: that can take longer than the attention.
LARGE_BLOCK = 2**25


# Heights and widths of several maps.
Levels = tuple[tuple[int, int], ...]


class AttentionCall(NamedTuple):
    """The arguments of :func:`sasa_det.ops.local_attention`.

    With ``levels`` the maps are (N, C, 1, positions) and hold the positions of several maps, one
    behind the other; Triton serves them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    rel_rows: Tensor | None
    rel_cols: Tensor | None
    num_heads: int
    kernel_size: int
    levels: Levels | None = None

    def refusal_of_levels(self) -> str | None:
        """Of a backend that serves one map only."""
        return None if self.levels is None else "it does not serve several maps packed in one"


class ProjectedCall(NamedTuple):
    """The arguments of :func:`sasa_det.ops.projected_attention`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    rel_rows: Tensor | None
    rel_cols: Tensor | None
    residual: Tensor | None
    output_scale: Tensor | None
    output_shift: Tensor | None
    num_heads: int
    kernel_size: int

    def output_shape(self) -> torch.Size:
        return _projected_shape(self.x, self.weight.shape[0] // 3)


class ResidualCall(NamedTuple):
    """The arguments of :func:`sasa_det.ops.residual_projection`."""

    residual: Tensor
    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def output_shape(self) -> torch.Size:
        return _projected_shape(self.x, self.weight.shape[0])


class GroupNormCall(NamedTuple):
    """The arguments of :func:`sasa_det.ops.group_norm_relu`, and the statistics if known.

    These are (N, maps, 2, num_groups), in float32: means and sums of squared deviations of an
    image's one map, or of its ``levels``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    statistics: Tensor | None
    num_groups: int
    eps: float
    levels: Levels | None = None


class StemCall(NamedTuple):
    """The arguments of :func:`sasa_det.ops.stem_attention`."""

    image: Tensor
    query_weight: Tensor
    key_weight: Tensor
    value_weights: Tensor
    mixture: Tensor
    rel_rows: Tensor | None
    rel_cols: Tensor | None
    num_heads: int


def _projected_shape(x: Tensor, channels: int) -> torch.Size:
    n, _, height, width = x.shape
    return torch.Size((n, channels, height, width))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def empty_gradient(call: AttentionCall, dtype: torch.dtype | None = None) -> Tensor:
    """For the gradients of query, key and value: (N, 3 * C, H, W) in the query's memory format."""
    return empty_map(call.query, 3 * call.query.shape[1], dtype)


def memory_format(x: Tensor) -> torch.memory_format:
    """The one of a map (N, C, H, W) that its strides resemble."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_map(x: Tensor, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """(N, channels, H, W) on the device and in the memory format of ``x``."""
    n, _, height, width = x.shape
    return torch.empty(
        (n, channels, height, width),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=memory_format(x),
    )


def empty_logsumexp(x: Tensor, num_heads: int) -> Tensor:
    """(N, num_heads, H, W) in float32, for a map (N, C, H, W)."""
    n, _, height, width = x.shape
    return x.new_empty((n, num_heads, height, width), dtype=torch.float32)


def empty_pooled(call: StemCall) -> Tensor:
    """(N, C, blocks down, blocks across) for the pooled stem's maximum.

    In channels_last: convolution and attention are quicker there, and follow the format of their
    input.
    """
    n, _, height, width = call.image.shape
    channels, block_size = call.query_weight.shape[0], call.mixture.shape[-1]
    return torch.empty(
        (n, channels, -(-height // block_size), -(-width // block_size)),
        dtype=call.image.dtype,
        device=call.image.device,
        memory_format=torch.channels_last,
    )
