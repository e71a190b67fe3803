"""ResNet-26, 38, 50 and deeper with attention where the config says, and the same with an FPN."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn

from sasa_det.checkpoint import warn_of_frozen_random_weights
from sasa_det.config import STAGES, STEMS, check_choice, check_sasa_config

from .blocks import AttentionBottleneckBlock, AttentionStem
from .checkpointing import checkpoint_stages
from .fpn import AttentionFPN
from .norm import check_norm

_BLOCKS_PER_STAGE = {
    26: (1, 2, 4, 1),
    38: (2, 3, 5, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def make_sasa_resnet(
    *,
    depth: int = 50,
    stem: str = "attention",
    stem_mixed_values: bool = True,
    attention_stages: Sequence[str] = ("res2", "res3", "res4", "res5"),
    kernel_size: int = 7,
    num_heads: int = 8,
    position: str = "relative",
    residual: bool = True,
    norm="BN",
    in_channels: int = 3,
    stem_channels: int = 64,
    bottleneck_channels: int = 64,
    res2_channels: int = 256,
    num_groups: int = 1,
    stride_in_1x1: bool = False,
    num_classes: int | None = None,
    out_features: Sequence[str] | None = None,
    freeze_at: int = 0,
    activation_checkpointing: bool = False,
) -> ResNet:
    """detectron2's ResNet with the stem and the stages named here made of attention.

    Args:
        depth (int): 26, 38, 50, 101 or 152.
        stem (str): "attention" or "conv".
        stem_mixed_values (bool): of the attention stem, see :class:`AttentionStem`.
        attention_stages (tuple[str]): out of res2, res3, res4, res5; the others are convolutional.
        kernel_size, num_heads, position: of every attention layer.
        residual (bool): around the attention of each bottleneck.
        norm (str or callable): as in detectron2's ``get_norm``.
        in_channels, stem_channels, res2_channels (int): of the image, the stem and stage res2.
        bottleneck_channels (int): channels of the attention, or 3x3 convolution, of stage res2.
        num_groups, stride_in_1x1: of convolutional blocks, as in detectron2's ``BottleneckBlock``.
        num_classes (int or None): if given, a classifier, as in the paper's Table 1.
        out_features, freeze_at: as in detectron2's ``ResNet``.
        activation_checkpointing (bool): keep of each block its input only, in training.

    Raises:
        ValueError: for an unknown depth or channels that the heads do not divide.
    """
    if depth not in _BLOCKS_PER_STAGE:
        known = ", ".join(map(str, _BLOCKS_PER_STAGE))
        raise ValueError(f"The depth (MODEL.RESNETS.DEPTH) must be one of {known}, but is {depth}.")
    check_choice("stem", stem, STEMS)
    for stage in attention_stages:
        check_choice("attention_stages", stage, STAGES)
    attention: dict[str, Any] = {"num_heads": num_heads, "position": position}
    stem_module: CNNBlockBase
    if stem == "conv":
        stem_module = BasicStem(in_channels, stem_channels, norm=norm)
    else:
        stem_module = AttentionStem(
            in_channels, stem_channels, norm=norm, mixed_values=stem_mixed_values, **attention
        )
    stages = []
    channels, out_channels = stem_channels, res2_channels
    for index, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        if f"res{index + 2}" in attention_stages:
            options = {
                "block_class": AttentionBottleneckBlock,
                "kernel_size": kernel_size,
                "residual": residual,
                **attention,
            }
        else:
            options = {
                "block_class": BottleneckBlock,
                "num_groups": num_groups,
                "stride_in_1x1": stride_in_1x1,
            }
        first_stride = 1 if index == 0 else 2
        stages.append(
            ResNet.make_stage(
                num_blocks=num_blocks,
                stride_per_block=[first_stride] + [1] * (num_blocks - 1),
                in_channels=channels,
                out_channels=out_channels,
                bottleneck_channels=bottleneck_channels * 2**index,
                norm=norm,
                **options,
            )
        )
        channels, out_channels = out_channels, out_channels * 2
    resnet = ResNet(stem_module, stages, num_classes, out_features, freeze_at)
    return checkpoint_stages(resnet) if activation_checkpointing else resnet


@BACKBONE_REGISTRY.register()
def build_sasa_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """The ResNet of ``MODEL.SASA`` and of the keys of ``MODEL.RESNETS`` that detectron2 reads.

    Raises:
        ValueError: for values that cannot be built.
    """
    check_sasa_config(cfg)
    _check_resnets(cfg)
    sasa, resnets = cfg.MODEL.SASA, cfg.MODEL.RESNETS
    resnet = make_sasa_resnet(
        depth=resnets.DEPTH,
        stem=sasa.STEM,
        stem_mixed_values=sasa.STEM_MIXED_VALUES,
        attention_stages=sasa.ATTENTION_STAGES,
        kernel_size=sasa.KERNEL_SIZE,
        num_heads=sasa.NUM_HEADS,
        position=sasa.POSITION,
        residual=sasa.BOTTLENECK_RESIDUAL,
        norm=resnets.NORM,
        in_channels=input_shape.channels,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        bottleneck_channels=resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
        res2_channels=resnets.RES2_OUT_CHANNELS,
        num_groups=resnets.NUM_GROUPS,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        activation_checkpointing=sasa.ACTIVATION_CHECKPOINTING,
    )
    if not any(parameter.is_meta for parameter in resnet.parameters()):  # nobody trains on meta
        warn_of_frozen_random_weights(cfg)
    return resnet


def _check_resnets(cfg: CfgNode) -> None:
    """Raises ValueError for what detectron2's ResNets can be and these cannot."""
    resnets = cfg.MODEL.RESNETS
    if resnets.RES5_DILATION != 1 or any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError(
            "The attention ResNets have no dilated and no deformable stages; "
            "leave MODEL.RESNETS.RES5_DILATION at 1 and DEFORM_ON_PER_STAGE at False."
        )
    if resnets.NUM_GROUPS > 1 and cfg.MODEL.SASA.ATTENTION_STAGES:
        raise ValueError(
            f"MODEL.RESNETS.NUM_GROUPS is {resnets.NUM_GROUPS}, but attention has heads and no "
            "groups; set NUM_GROUPS to 1 and WIDTH_PER_GROUP to 64."
        )
    for name in resnets.OUT_FEATURES:
        check_choice("MODEL.RESNETS.OUT_FEATURES", name, ("stem", *STAGES))
    channels = {
        "STEM_OUT_CHANNELS": resnets.STEM_OUT_CHANNELS,
        "NUM_GROUPS times WIDTH_PER_GROUP": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
        "RES2_OUT_CHANNELS": resnets.RES2_OUT_CHANNELS,
    }
    for key, number in channels.items():
        check_norm(resnets.NORM, number, f"MODEL.RESNETS.{key}")


@BACKBONE_REGISTRY.register()
def build_sasa_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The ResNet with FPN levels p2 to p6, for Faster R-CNN and its relatives."""
    return _build_fpn(cfg, input_shape, LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_sasa_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """The ResNet with FPN levels p3 to p7, for RetinaNet; p6 comes from p5, as the paper counts."""
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return _build_fpn(cfg, input_shape, LastLevelP6P7(channels, channels, in_feature="p5"))


def _build_fpn(cfg: CfgNode, input_shape: ShapeSpec, top_block: nn.Module) -> Backbone:
    options = {
        "bottom_up": build_sasa_resnet_backbone(cfg, input_shape),
        "in_features": cfg.MODEL.FPN.IN_FEATURES,
        "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
        "norm": cfg.MODEL.FPN.NORM,
        "top_block": top_block,
        "fuse_type": cfg.MODEL.FPN.FUSE_TYPE,
    }
    sasa = cfg.MODEL.SASA
    if not sasa.FPN_ATTENTION:
        return FPN(**options)
    return AttentionFPN(
        **options,
        kernel_size=sasa.KERNEL_SIZE,
        num_heads=sasa.NUM_HEADS,
        position=sasa.POSITION,
    )
