"""RetinaNet whose head may be made of attention."""

import math

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from torch import nn

from sasa_det.config import check_sasa_config
from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d

from .norm import attention_norm


@META_ARCH_REGISTRY.register()
class SASARetinaNet(RetinaNet):
    """detectron2's RetinaNet; with ``MODEL.SASA.HEAD_ATTENTION`` its head is made of attention."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_sasa_config(cfg)
        arguments = super().from_config(cfg)
        # RetinaNet.from_config builds its own head and offers no other way to choose one.
        if cfg.MODEL.SASA.HEAD_ATTENTION:
            shapes = arguments["backbone"].output_shape()
            input_shape = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
            arguments["head"] = AttentionRetinaNetHead(cfg, input_shape)
        return arguments


class AttentionRetinaNetHead(RetinaNetHead):
    """RetinaNet's head with local self-attention in the place of each 3x3 convolution.

    Tower layers become attention; a predictor becomes attention followed by a 1x1 convolution.
    Each attention, and that convolution, stands behind a norm and ReLU, each attention inside a
    residual connection.

    Args:
        input_shape (list[ShapeSpec]): shapes of the FPN levels, all with the same channels.
        num_classes, num_anchors, conv_dims, prior_prob: as in detectron2's ``RetinaNetHead``;
            all conv_dims must be the channels of the input.
        norm (str): in front of each attention and predictor; GN where it is empty.
        kernel_size (int): side of the attention window, odd.
        num_heads (int): heads of the attention.
        position (str): "relative" or "none".
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str = "",
        prior_prob: float = 0.01,
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
    ) -> None:
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=num_anchors,
            conv_dims=conv_dims,
            prior_prob=prior_prob,
        )
        channels = input_shape[0].channels
        if any(dim != channels for dim in conv_dims):
            raise ValueError(
                f"conv_dims must all be the {channels} channels of the input, but are {conv_dims}: "
                "the residual connections keep the number of channels."
            )

        if norm.endswith("BN"):
            raise ValueError(
                f"MODEL.RETINANET.NORM cannot be {norm!r} in an attention head, because all FPN "
                'levels share its layers; set it to "GN".'
            )

        def attention() -> PreActivationSelfAttention2d:
            layer = LocalSelfAttention2d(
                channels, channels, kernel_size, num_heads, position=position
            )
            return PreActivationSelfAttention2d(layer, attention_norm(norm, channels))

        def tower() -> nn.Sequential:
            return nn.Sequential(*(attention() for _ in conv_dims))

        def predictor(outputs: int, bias: float) -> nn.Sequential:
            projection = nn.Conv2d(channels, outputs, kernel_size=1)
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.constant_(projection.bias, bias)  # type: ignore[arg-type]
            # The norm makes the small weights keep to the prior: residual sums grow with depth.
            activation = nn.Sequential(attention_norm(norm, channels), nn.ReLU(inplace=True))
            return nn.Sequential(attention(), activation, projection)

        self.cls_subnet, self.bbox_subnet = tower(), tower()
        # The prior of the focal loss: at the start every class has the probability prior_prob.
        self.cls_score = predictor(
            num_anchors * num_classes, bias=-math.log((1 - prior_prob) / prior_prob)
        )
        self.bbox_pred = predictor(num_anchors * 4, bias=0.0)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        sasa = cfg.MODEL.SASA
        return {
            **super().from_config(cfg, input_shape),
            "kernel_size": sasa.KERNEL_SIZE,
            "num_heads": sasa.NUM_HEADS,
            "position": sasa.POSITION,
        }
