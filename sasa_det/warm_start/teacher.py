"""The convolutional model that a checkpoint describes."""

import dataclasses
import re

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock
from torch import nn

from .checkpoints import Source
from .convert import convert


def build_teacher(source: Source, cfg: CfgNode) -> tuple[nn.Module, set[str]]:
    """The convolutional model of a checkpoint, to learn from.

    Every 3x3 convolution gets its input at the resolution that the attention in its place has,
    wherever the checkpoint's stages downsample.

    Args:
        source (Source): from :func:`read_checkpoint`.
        cfg (CfgNode): of the attention model.

    Returns:
        (nn.Module, set[str]): the model, and the names of its modules that the checkpoint fills.

    Raises:
        ValueError: for a checkpoint that does not fit.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SASA.STEM = "conv"
    cfg.MODEL.SASA.ATTENTION_STAGES = ()
    cfg.MODEL.SASA.HEAD_ATTENTION = cfg.MODEL.SASA.FPN_ATTENTION = False
    stride_in_1x1 = source.stride_in_1x1
    if stride_in_1x1 is None:
        stride_in_1x1 = cfg.MODEL.RESNETS.STRIDE_IN_1X1
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    teacher = build_model(cfg).eval().requires_grad_(False)
    conversion = convert(teacher, dataclasses.replace(source, stride_in_1x1=False), cfg)
    for module in teacher.modules():
        if isinstance(module, BottleneckBlock) and module.stride > 1 and stride_in_1x1:
            # The same function, but the convolution gets the full resolution, as attention does.
            module.conv2.dilation = module.conv2.padding = (2, 2)
    if any(name.startswith("head.") for name in source.tensors):
        _check_towers([*conversion.new, *conversion.unused])
    new = {name.rpartition(".")[0] for name in conversion.new}
    known = {
        name
        for name, _ in teacher.named_modules()
        if not any(f"{other}.".startswith(f"{name}.") for other in new)
    }
    return teacher, known


def _check_towers(odd: list[str]) -> None:
    """Towers that are half the checkpoint's and half random teach nothing."""
    in_towers = [name for name in odd if re.match(r"head\.(cls|bbox)_subnet\.", name)]
    if in_towers:
        raise ValueError(
            f"The checkpoint's head has other towers than the config's: {', '.join(in_towers[:3])} "
            "is in one of them only; set MODEL.RETINANET.NORM and NUM_CONVS to the checkpoint's, "
            "or add --only-resnet."
        )
