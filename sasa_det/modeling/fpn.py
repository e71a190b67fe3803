"""A feature pyramid whose output convolutions are attention: a step beyond the paper."""

from typing import Any

from detectron2.modeling import FPN

from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d

from .norm import attention_norm


class AttentionFPN(FPN):
    """detectron2's FPN with local self-attention in the place of its 3x3 output convolutions.

    Args:
        kernel_size (int): side of the attention window, odd.
        num_heads (int): heads of the attention.
        position (str): "relative", "absolute" or "none".
        norm (str): for the lateral convolutions as in detectron2, and in front of each attention;
            there GN where it is empty.
        options: the other arguments of detectron2's ``FPN``.
    """

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
        norm: str = "",
        **options: Any,
    ) -> None:
        super().__init__(norm=norm, **options)
        channels = options["out_channels"]
        names = [name for name in self._modules if name.startswith("fpn_output")]
        for name in names:
            attention = LocalSelfAttention2d(
                channels, channels, kernel_size, num_heads, position=position
            )
            setattr(
                self, name, PreActivationSelfAttention2d(attention, attention_norm(norm, channels))
            )
        # FPN walks its own list, from the lowest resolution to the highest.
        self.output_convs = [getattr(self, name) for name in reversed(names)]
