"""Every backbone obeys detectron2's contract, for images of any size."""

import itertools
import random

import pytest
import torch
from torch import nn

import sasa_det

# isort: split
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from detectron2.structures import ImageList

from sasa_det.modeling import make_sasa_resnet

STAGES = ("res2", "res3", "res4", "res5")
# Builder: its levels with their strides.
BUILDERS = {
    "build_sasa_resnet_backbone": {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32},
    "build_sasa_resnet_fpn_backbone": {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64},
    "build_retinanet_sasa_resnet_fpn_backbone": {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128},
}
PARTS = {
    "convolution": ("conv", (), False),
    "conv stem": ("conv", STAGES, False),
    "late stages": ("conv", ("res4", "res5"), False),
    "attention": ("attention", STAGES, False),
    "attention, FPN too": ("attention", STAGES, True),
}


def build(builder, parts="attention", freeze_at=0, width=8):
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    resnets, sasa = cfg.MODEL.RESNETS, cfg.MODEL.SASA
    sasa.STEM, sasa.ATTENTION_STAGES, sasa.FPN_ATTENTION = PARTS[parts]
    sasa.KERNEL_SIZE, sasa.NUM_HEADS = 3, 2
    resnets.DEPTH, resnets.NORM = 26, "BN"
    resnets.STEM_OUT_CHANNELS = resnets.WIDTH_PER_GROUP = width
    resnets.RES2_OUT_CHANNELS = 2 * width
    resnets.OUT_FEATURES = list(STAGES)
    if builder == "build_sasa_resnet_backbone":
        resnets.OUT_FEATURES = ["stem", *STAGES]
    cfg.MODEL.FPN.IN_FEATURES = list(STAGES[1:] if "retinanet" in builder else STAGES)
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.BACKBONE.NAME = builder
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    return build_backbone(cfg, ShapeSpec(channels=3))


def batches(count=2):
    """Pairs of images of odd sizes, from a few pixels up."""
    sizes = random.Random(0)
    for _ in range(count):
        yield [torch.rand(3, sizes.randint(5, 140), sizes.randint(5, 140)) for _ in range(2)]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("builder", BUILDERS)
def test_levels_have_the_channels_and_the_strides_that_are_declared(builder, parts):
    backbone = build(builder, parts).eval()
    shapes = backbone.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == BUILDERS[builder]
    for images in batches():
        # As every meta-architecture pads them; 0.5 knows no padding_constraints.
        constraints = getattr(backbone, "padding_constraints", None)
        options = {"padding_constraints": constraints} if constraints else {}
        batch = ImageList.from_tensors(images, backbone.size_divisibility, **options)
        with torch.no_grad():
            outputs = backbone(batch.tensor)
        assert set(outputs) == set(shapes)
        for name, shape in shapes.items():
            sides = [-(-side // shape.stride) for side in batch.tensor.shape[-2:]]
            assert outputs[name].shape == (2, shape.channels, *sides)
            assert outputs[name].isfinite().all()


@pytest.mark.parametrize("builder", BUILDERS)
def test_an_fpn_asks_for_the_padding_that_its_levels_need_and_a_resnet_for_none(builder):
    backbone = build(builder)
    assert backbone.size_divisibility == (32 if "fpn" in builder else 0)
    # Upstream's; a square is nobody's wish here.
    assert not any(getattr(backbone, "padding_constraints", {}).values())


@pytest.mark.parametrize(("builder", "freeze_at"), list(itertools.product(BUILDERS, [0, 2, 5])))
def test_freezing_stops_at_the_stage_that_is_named(builder, freeze_at):
    backbone = build(builder, freeze_at=freeze_at)
    resnet = getattr(backbone, "bottom_up", backbone)
    frozen = ["stem", *STAGES][:freeze_at]
    for name, parameter in resnet.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in frozen), name
    for name, module in resnet.named_modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            is_frozen = isinstance(module, FrozenBatchNorm2d)
            assert is_frozen == (name.split(".")[0] in frozen), name
    # What is not frozen learns.
    features = backbone.train()(torch.rand(2, 3, 64, 96))
    if freeze_at < 5 or resnet is not backbone:
        sum(feature.sum() for feature in features.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("depth", [26, 38, 50])
@pytest.mark.parametrize("stem", ["conv", "attention"])
def test_a_resnet_of_any_depth_takes_odd_sizes_and_freezes_later(depth, stem):
    features = ("stem", "res2", "res3", "res4", "res5")
    backbone = make_sasa_resnet(
        depth=depth,
        stem=stem,
        num_heads=2,
        stem_channels=8,
        bottleneck_channels=8,
        res2_channels=16,
        out_features=features,
    ).eval()
    # Odd sizes too: a backbone without FPN declares no divisibility.
    images = torch.randn(1, 3, 75, 90)
    outputs = backbone(images)
    for name, shape in backbone.output_shape().items():
        height, width = outputs[name].shape[-2:]
        assert outputs[name].shape[1] == shape.channels
        assert (height, width) == (-(-75 // shape.stride), -(-90 // shape.stride))
    frozen = backbone.freeze(3)
    assert not any(p.requires_grad for p in frozen.stem.parameters())
    assert not any(p.requires_grad for p in frozen.res3.parameters())
    assert all(p.requires_grad for p in frozen.res4.parameters())
