"""What detectron2 does not have: an attention stem, block, FPN and head, and their builders.

Importing this package registers them with detectron2.
"""

from .backbone import (
    build_retinanet_sasa_resnet_fpn_backbone,
    build_sasa_resnet_backbone,
    build_sasa_resnet_fpn_backbone,
    make_sasa_resnet,
)
from .blocks import AttentionBottleneckBlock, AttentionStem
from .fpn import AttentionFPN
from .inference import fold_batch_norm
from .retinanet import AttentionRetinaNetHead, SASARetinaNet

__all__ = [
    "AttentionBottleneckBlock",
    "AttentionFPN",
    "AttentionRetinaNetHead",
    "AttentionStem",
    "SASARetinaNet",
    "build_retinanet_sasa_resnet_fpn_backbone",
    "build_sasa_resnet_backbone",
    "build_sasa_resnet_fpn_backbone",
    "fold_batch_norm",
    "make_sasa_resnet",
]
