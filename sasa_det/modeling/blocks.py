"""The stem and the bottleneck of the attention ResNets."""

import math

import fvcore.nn.weight_init as weight_init
import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, get_norm
from torch import Tensor, nn

from sasa_det.layers import LocalSelfAttention2d, StemSelfAttention2d
from sasa_det.layers.kept import computed_again
from sasa_det.layers.local_attention import add_attention, has_hooks, is_plain
from sasa_det.ops import residual_projection
from sasa_det.ops.operator import makes_a_program
from sasa_det.ops.projected import keeps_output

from .norm import (
    batch_norm_of_maximum,
    channel_sign,
    fold,
    folds,
    is_batch_norm,
    scale_and_shift,
)


class AttentionStem(CNNBlockBase):
    """The attention stem of arXiv 1906.05909, section 3.3: stride 4, as the convolutional one.

    Args:
        in_channels (int): channels of the image.
        out_channels (int): channels of the output.
        norm (str or callable): normalisation after the attention, as in detectron2's ``get_norm``.
        num_heads (int): heads of the attention.
        position (str): "relative" or "none".
        mixed_values (bool): values spatially mixed out of four projections, or one projection.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        *,
        norm="BN",
        num_heads: int = 8,
        position: str = "relative",
        mixed_values: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, stride=4)
        self.attention = StemSelfAttention2d(
            in_channels,
            out_channels,
            num_heads=num_heads,
            num_mixtures=4 if mixed_values else 1,
            position=position,
        )
        self.norm = get_norm(norm, out_channels) or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self._may_pool_first() and not x.requires_grad:
            # At full resolution the attention's output would be the detector's largest tensor.
            pooled = self.attention.pooled(x, channel_sign(self.norm))
            count = x.shape[0] * x.shape[2] * x.shape[3]
            return F.relu_(batch_norm_of_maximum(self.norm, *pooled, count))
        # Not in place: without a norm this is what the attention keeps for its backward.
        x = F.relu(self.norm(self.attention(x)))
        # ceil_mode: a block clipped by the border still is one position of the output.
        return F.max_pool2d(x, kernel_size=4, stride=4, ceil_mode=True)

    def _may_pool_first(self) -> bool:
        norm = self.norm
        if not is_batch_norm(norm) or has_hooks(norm) or has_hooks(self.attention):
            return False
        return getattr(norm, "process_group", None) is None


class AttentionBottleneckBlock(CNNBlockBase):
    """A bottleneck whose spatial layer is local self-attention, arXiv 1906.05909, section 3.2.

    1x1 convolution, attention at the resolution of the input, 2x2 average pooling where the block
    downsamples, 1x1 convolution, and detectron2's projection shortcut. Attention averages, so it
    begins as a blur, which a residual around it makes up for; the paper has none there.

    Args:
        in_channels, out_channels (int): channels of input and output.
        bottleneck_channels (int): channels of the attention.
        stride (int): 1 or 2.
        norm (str or callable): normalisation after each layer, as in detectron2's ``get_norm``.
        kernel_size (int): side of the attention window, odd.
        num_heads (int): heads of the attention.
        position (str): "relative", "absolute" or "none".
        residual (bool): whether the attention's input is added to its output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int = 1,
        norm="BN",
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
        residual: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, stride)
        self.residual = residual
        self.shortcut = None
        if in_channels != out_channels or stride != 1:
            self.shortcut = _conv_1x1(in_channels, out_channels, norm, stride=stride)
        self.conv1 = _conv_1x1(in_channels, bottleneck_channels, norm)
        self.attention = LocalSelfAttention2d(
            bottleneck_channels, bottleneck_channels, kernel_size, num_heads, position=position
        )
        self.attention_norm = get_norm(norm, bottleneck_channels) or nn.Identity()
        self.conv3 = _conv_1x1(bottleneck_channels, out_channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = self.attend(out)
        # What the attention returned may be what it keeps for its backward; a sum is not.
        out = F.relu_(out) if self.residual else F.relu(out)
        folded = self.conv3.folded(out) if is_plain(self.conv3, PointwiseConv2d) else None
        if folded is not None:
            return residual_projection(self._shortcut_of(x), out, *folded)
        out = self.conv3(out)
        out += self._shortcut_of(x)  # not before: what conv3 was given is gone by now
        return F.relu_(out)

    def _shortcut_of(self, x: Tensor) -> Tensor:
        return x if self.shortcut is None else self.shortcut(x)

    def attend(self, x: Tensor) -> Tensor:
        """What stands for the 3x3 convolution and its norm: attention, pooling, norm."""
        residual = x if self.residual else None
        attention = self.attention
        if is_plain(attention, LocalSelfAttention2d) and folds(self.attention_norm, x):
            # Pooling averages, so a scale and a shift are the same before it and behind it.
            return self._pool(attention.add_to(residual, x, *scale_and_shift(self.attention_norm)))
        output_is_kept = torch.is_grad_enabled() and keeps_output(x) and not makes_a_program()
        if residual is None or not output_is_kept:
            return self.attention_norm(self._pool(add_attention(residual, attention, x)))
        attended = add_attention(None, attention, x)
        total = x + attended
        with computed_again(total, torch.add, x, attended):  # which the attention keeps anyway
            return self.attention_norm(self._pool(total))

    def _pool(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        # ceil_mode: the size that the shortcut's strided convolution has.
        return F.avg_pool2d(x, kernel_size=2, stride=self.stride, ceil_mode=True)


class PointwiseConv2d(Conv2d):
    """detectron2's convolution, 1x1; in evaluation on the CPU its batch norm costs no pass.

    Without gradients the norm is folded into the weights in each forward (see :func:`folds`), where
    these are fewer than what the norm would pass over.
    """

    def forward(self, x: Tensor) -> Tensor:
        folded = self.folded(x)
        return super().forward(x) if folded is None else F.conv2d(x, *folded, self.stride)

    def folded(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias with the norm in them, where that is quicker than the norm."""
        if self.norm is None:  # nothing to fold, or fold_batch_norm has been there
            return self.weight, self.bias
        if not folds(self.norm, x):
            return None
        positions = x.shape[0] * x.shape[2] * x.shape[3] // math.prod(self.stride)
        if self.in_channels >= positions:
            return None
        return fold(self.weight, self.bias, self.norm)


def _conv_1x1(in_channels: int, out_channels: int, norm, *, stride: int = 1) -> PointwiseConv2d:
    conv = PointwiseConv2d(
        in_channels,
        out_channels,
        kernel_size=1,
        stride=stride,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
    weight_init.c2_msra_fill(conv)
    return conv
