"""Local self-attention in the place of a k x k convolution."""

from typing import TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from sasa_det.ops import (
    NormedLayer,
    group_norm_relu,
    local_attention,
    local_attention_weights,
    normed_attention,
    projected_attention,
)
from sasa_det.ops.checks import check_heads, check_kernel_size
from sasa_det.ops.operator import makes_a_program, shows_steps
from sasa_det.ops.steps import add_and_scale

from .kept import computed_again

Kind = TypeVar("Kind", bound=nn.Module)

POSITIONS = ("relative", "absolute", "none")
EMBEDDING_STD = 0.1


class LocalSelfAttention2d(nn.Module):
    """Stand-alone local self-attention, Eq. 3 of arXiv 1906.05909: what replaces a convolution.

    Queries, keys and values are three full 1x1 projections without bias; there is no output
    projection. The paper's text reads as if the projections were grouped by head, its parameter
    counts say that they are full. The resolution stays as it is; the paper downsamples by average
    pooling afterwards.

    Args:
        in_channels (int): channels of the input.
        out_channels (int): channels of the output, num_heads * head_dim with an even head_dim.
        kernel_size (int): side of the window, odd.
        num_heads (int): number of heads.
        position (str): "relative" adds learned row and column embeddings, one a head and an offset
            (the paper shares nothing between heads); "absolute" adds :func:`sinusoidal_encodings`
            to the input and needs in_channels divisible by 4; "none" attends by content only.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H, W), any H, W >= 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 7,
        num_heads: int = 8,
        *,
        position: str = "relative",
    ) -> None:
        super().__init__()
        head_dim = check_heads(out_channels, num_heads)
        check_kernel_size(kernel_size)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.position = position
        if position == "absolute":
            check_encoded_channels(in_channels)
        # Query, key and value in one convolution: the input is read once.
        self.projection = nn.Conv2d(in_channels, 3 * out_channels, kernel_size=1, bias=False)
        self.rel_rows, self.rel_cols = make_embeddings(num_heads, kernel_size, head_dim, position)
        init_projection(self.projection.weight, out_channels, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.add_to(None, x)

    def add_to(
        self,
        residual: Tensor | None,
        x: Tensor,
        output_scale: Tensor | None = None,
        output_shift: Tensor | None = None,
    ) -> Tensor:
        """residual + self(x), scaled and shifted by channel, without a pass of its own.

        The residual is (N, out_channels, H, W); scale and shift are (out_channels,), if given.
        """
        x = self._with_position(x)
        embeddings = (self.rel_rows, self.rel_cols)
        heads, size = self.num_heads, self.kernel_size
        projection = self.projection
        if is_pointwise(projection):
            weight, bias = projection.weight, projection.bias
            return projected_attention(
                x,
                weight,
                *embeddings,
                bias=bias,
                residual=residual,
                output_scale=output_scale,
                output_shift=output_shift,
                num_heads=heads,
                kernel_size=size,
            )
        query, key, value = projection(x).chunk(3, dim=1)
        output = local_attention(query, key, value, *embeddings, num_heads=heads, kernel_size=size)
        return add_and_scale(output, residual, output_scale, output_shift)

    def attention_weights(self, x: Tensor) -> Tensor:
        """What each position attends to: (N, num_heads, kernel_size**2, H, W), summing to one."""
        query, key, _ = self.projection(self._with_position(x)).chunk(3, dim=1)
        return local_attention_weights(
            query,
            key,
            self.rel_rows,
            self.rel_cols,
            num_heads=self.num_heads,
            kernel_size=self.kernel_size,
        )

    def window_corner(self, row: int, col: int) -> tuple[int, int]:
        """Row and column of the first position of the window that (row, col) attends to.

        The first of :meth:`attention_weights` is its weight; it may lie outside the map.
        """
        return row - self.kernel_size // 2, col - self.kernel_size // 2

    def _with_position(self, x: Tensor) -> Tensor:
        return x + sinusoidal_encodings(x) if self.position == "absolute" else x

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"num_heads={self.num_heads}, position={self.position}"
        )


class PreActivationSelfAttention2d(nn.Module):
    """x + attention(relu(norm(x))): how attention stands where no batch norm precedes it.

    Eq. 3 has no scale, so its softmax freezes when its input is large, as the outputs of an FPN
    are; a norm in front keeps the logits small, and the residual keeps gradients alive. Behind the
    ReLU queries have a mean, by which they can meet the position embeddings whatever the content,
    as in the backbone. The paper is silent on all three; docs/learning.md shows their worth.

    Args:
        attention (nn.Module): channels and resolution of its output are those of its input.
        norm (nn.Module): applied to the input of the attention.
    """

    def __init__(self, attention: LocalSelfAttention2d, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not is_plain(norm, nn.GroupNorm):  # others may need their output, or to be called once
            return add_attention(x, self.attention, F.relu(norm(x)))
        parts = self.parts()
        fused = None if parts is None else normed_attention(x, [parts])
        if fused is not None:
            return fused
        # A group norm costs less to compute again than its output takes memory until then. Exported
        # programs are to show it once.
        if torch.compiler.is_compiling() and torch.is_grad_enabled() and not shows_steps():
            normed = checkpoint(
                lambda x: F.relu_(norm(x)), x, use_reentrant=False, preserve_rng_state=False
            )
            return add_attention(x, self.attention, normed)
        normed = norm(x)
        if not normed.requires_grad or makes_a_program():
            return add_attention(x, self.attention, F.relu_(normed))
        # The norm keeps x, but the module may have other weights by then.
        parameters = (None if t is None else t.detach().clone() for t in (norm.weight, norm.bias))

        def compute(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            return F.relu_(F.group_norm(x, norm.num_groups, weight, bias, norm.eps))

        with computed_again(normed, compute, x, *parameters):
            return add_attention(x, self.attention, F.relu_(normed))

    def parts(self) -> NormedLayer | None:
        """What it computes with; None where a module is replaced."""
        attention = self.attention
        if not is_plain(attention, LocalSelfAttention2d) or attention.position == "absolute":
            return None
        layer = normed_projection(self.norm, attention.projection)
        return layer and layer._replace(
            rel_rows=attention.rel_rows,
            rel_cols=attention.rel_cols,
            num_heads=attention.num_heads,
            kernel_size=attention.kernel_size,
        )


class NormReLU(nn.Sequential):
    """A norm and ReLU, as one where there is a kernel for both.

    The ReLU is a module for its place among the names of the weights.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__(norm, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        norm = self[0]
        if not self._is_itself() or not is_plain(norm, nn.GroupNorm):
            return super().forward(x)
        fused = group_norm_relu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
        return F.relu_(norm(x)) if fused is None else fused

    def parts(self, projection: nn.Module) -> NormedLayer | None:
        """What it computes with, and the 1x1 convolution behind it; None where that is another one
        or a module is replaced."""
        return normed_projection(self[0], projection) if self._is_itself() else None

    def _is_itself(self) -> bool:
        return len(self) == 2 and is_plain(self[1], nn.ReLU)


def add_attention(residual: Tensor | None, attention: nn.Module, x: Tensor) -> Tensor:
    """residual + attention(x), whatever stands in the attention's place."""
    if is_plain(attention, LocalSelfAttention2d):
        return attention.add_to(residual, x)
    output = attention(x)
    return output if residual is None else residual + output


def normed_projection(norm: nn.Module, projection: nn.Module) -> NormedLayer | None:
    """What a norm and the projection behind it compute with; None where one is not plain."""
    if not is_plain(norm, nn.GroupNorm) or not is_pointwise(projection):
        return None
    return NormedLayer(
        norm.weight,
        norm.bias,
        projection.weight,
        projection.bias,
        rel_rows=None,
        rel_cols=None,
        num_groups=norm.num_groups,
        eps=norm.eps,
        num_heads=None,
        kernel_size=1,
    )


def is_plain(module: nn.Module, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether it is of this very class, and its weights are all there is to it."""
    return type(module) is kind and not has_hooks(module)


def is_pointwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a plain 1x1 convolution that reads each position and channel."""
    if not is_plain(module, nn.Conv2d) or module.groups != 1:
        return False
    return (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody counts on its forward being called, or has put another in its place."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def make_embeddings(
    num_heads: int, num_offsets: int, head_dim: int, position: str
) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Row and column embeddings (num_heads, num_offsets, head_dim // 2), or (None, None)."""
    if position not in POSITIONS:
        raise ValueError(f"position must be one of {', '.join(POSITIONS)}, but is {position!r}.")
    if position != "relative":
        return None, None
    shape = (num_heads, num_offsets, head_dim // 2)
    # Small, so that training starts from attention by content: drawn at 1.0 it learns less well.
    rows, cols = (nn.Parameter(torch.randn(shape) * EMBEDDING_STD) for _ in range(2))
    return rows, cols


def check_encoded_channels(channels: int) -> None:
    if channels % 4:
        raise ValueError(
            f"Absolute positions need channels divisible by 4, sines and cosines of rows and of "
            f"columns, but there are {channels}; choose another number, or position relative."
        )


def sinusoidal_encodings(x: Tensor) -> Tensor:
    """The absolute positions of a map (N, C, H, W), (1, C, H, W): what is added to its content.

    The paper (section 2.2) names sinusoids of the absolute position and defines no more. Here the
    first half of the channels encodes the row, the second the column, in pixels of the map: sines,
    then cosines, of wavelengths from 2 pi to 10000 * 2 pi, as in "Attention Is All You Need".
    """
    channels, height, width = x.shape[1:]
    steps = torch.arange(channels // 4, device=x.device, dtype=torch.float32)
    frequencies = (10000 ** (-4 / channels * steps))[:, None, None]
    halves = []
    for size, shape in ((height, (1, height, 1)), (width, (1, 1, width))):
        position = torch.arange(size, device=x.device, dtype=torch.float32).view(shape)
        angles = frequencies * position
        halves += [wave.expand(-1, height, width) for wave in (angles.sin(), angles.cos())]
    return torch.cat(halves)[None].to(x.dtype)


@torch.no_grad()
def init_projection(weight: Tensor, out_channels: int, head_dim: int) -> None:
    """Variance-preserving, and the queries scaled by head_dim ** -0.5.

    Eq. 3 has no hidden scale; this makes the logits of an input of unit variance start at unit
    variance. ``weight`` holds the rows of query, key and value, one after another.
    """
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    weight[:out_channels] *= head_dim**-0.5
