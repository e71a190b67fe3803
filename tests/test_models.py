"""The detectron2 parts: registered, obeying detectron2's contracts, built by every config."""

import json
import re

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

# isort: split
from conftest import CONFIGS, ROOT
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from sasa_det.config import load_config
from sasa_det.engine import Trainer
from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.modeling import (
    AttentionBottleneckBlock,
    AttentionStem,
    blocks,
    fold_batch_norm,
    make_sasa_resnet,
)

DETECTORS = sorted(path.stem for path in CONFIGS.glob("retinanet_*.yaml"))


def small(config: str, *overrides: str):
    """A config at a width that is quick to run; the structure stays."""
    narrow = [
        *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "26", "MODEL.RESNETS.NORM", "BN"),
        *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "64"),
        *("MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.RETINANET.NUM_CONVS", "2"),
    ]
    return load_config(str(CONFIGS / f"{config}.yaml"), [*narrow, *overrides])


def a_sample(height=96, width=128):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20.0, 60.0, 70.0]]))
    instances.gt_classes = torch.tensor([3])
    return {"image": torch.rand(3, height, width) * 255, "instances": instances}


def test_everything_is_registered_under_its_name():
    for name in (
        "build_sasa_resnet_backbone",
        "build_sasa_resnet_fpn_backbone",
        "build_retinanet_sasa_resnet_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY
    assert "SASARetinaNet" in META_ARCH_REGISTRY


@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        *((config, []) for config in DETECTORS),
        ("retinanet_convstem_attn", ["MODEL.SASA.POSITION", "absolute"]),
        ("retinanet_full_attn_fpn", ["MODEL.SASA.POSITION", "none"]),
        ("retinanet_full_attn", ["MODEL.SASA.STEM_MIXED_VALUES", "False"]),
    ],
    ids=lambda x: x[-1] if isinstance(x, list) and x else "",
)
def test_every_config_trains_all_its_parameters_and_detects(config, overrides):
    torch.manual_seed(0)
    model = build_model(small(config, "MODEL.SASA.NUM_HEADS", "4", *overrides)).train()
    with EventStorage():
        losses = model([a_sample(), a_sample(128, 64)])
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    with torch.no_grad():
        (output,) = model.eval()([a_sample()])
    assert output["instances"].image_size == (96, 128)


@pytest.mark.parametrize(
    ("config", "stem", "stages", "head", "fpn"),
    [
        ("retinanet_conv", False, False, False, False),
        ("retinanet_convstem_attn_backbone", False, True, False, False),
        ("retinanet_full_attn_backbone", True, True, False, False),
        ("retinanet_convstem_attn", False, True, True, False),
        ("retinanet_full_attn", True, True, True, False),
        ("retinanet_full_attn_fpn", True, True, True, True),
    ],
)
def test_attention_is_where_the_row_says_and_nowhere_else(config, stem, stages, head, fpn):
    model = build_model(small(config, "MODEL.SASA.NUM_HEADS", "4"))
    resnet = model.backbone.bottom_up
    assert isinstance(resnet.stem, AttentionStem if stem else BasicStem)
    block = AttentionBottleneckBlock if stages else BottleneckBlock
    blocks = [block for name in resnet.stage_names for block in getattr(resnet, name)]
    assert all(isinstance(b, block) for b in blocks)

    def count(module):
        return sum(isinstance(m, LocalSelfAttention2d) for m in module.modules())

    assert count(model.head) == (2 * (2 + 1) if head else 0)
    assert count(model.backbone) - count(resnet) == (3 if fpn else 0)


def test_a_full_attention_detector_has_no_spatial_convolution_left_but_p6_and_p7():
    model = build_model(small("retinanet_full_attn_fpn", "MODEL.SASA.NUM_HEADS", "4"))
    spatial = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size != (1, 1)
    ]
    assert spatial == ["backbone.top_block.p6", "backbone.top_block.p7"]


def test_the_head_starts_at_the_prior_of_the_focal_loss():
    model = build_model(small("retinanet_full_attn", "MODEL.SASA.NUM_HEADS", "4")).eval()
    features = [torch.randn(1, 64, size, size) for size in (16, 8, 4, 2, 1)]
    logits, deltas = model.head(features)
    assert [x.shape[1] for x in logits] == [6 * 5] * 5
    assert [x.shape[1] for x in deltas] == [6 * 4] * 5
    assert logits[0].sigmoid().mean().item() == pytest.approx(0.01, rel=0.05)
    towers = [m for m in model.head.modules() if isinstance(m, PreActivationSelfAttention2d)]
    assert len(towers) == 6


def test_a_faster_rcnn_takes_the_backbone_as_the_readme_says(tmp_path):
    # What detectron2's own Base-RCNN-FPN.yaml says; the package on PyPI lacks that file.
    features = ["p2", "p3", "p4", "p5"]
    base = {
        "MODEL": {
            "BACKBONE": {"NAME": "build_resnet_fpn_backbone"},
            "RESNETS": {"OUT_FEATURES": ["res2", "res3", "res4", "res5"]},
            "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"]},
            "ANCHOR_GENERATOR": {"SIZES": [[32], [64], [128], [256], [512]]},
            "RPN": {"IN_FEATURES": [*features, "p6"]},
            "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": features},
            "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "POOLER_RESOLUTION": 7},
        },
        "VERSION": 2,
    }
    path = tmp_path / "faster_rcnn.yaml"
    path.write_text(json.dumps(base))  # JSON is YAML

    readme = (ROOT / "README.md").read_text()
    recipe = readme.split("```python\n")[1].split("```")[0]
    names = {}
    exec(re.sub(r'"[^"]+\.yaml"', f'"{path}"', recipe), names)
    cfg = names["cfg"]
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).train()
    with EventStorage():
        losses = model([a_sample()])
    sum(losses.values()).backward()
    stem = model.backbone.bottom_up.stem
    assert isinstance(stem, AttentionStem)
    assert stem.attention.value_weights.grad.any()


@pytest.mark.parametrize("norm", ["", "GN", "FrozenBN"])
def test_backbones_take_detectron2s_norms(norm):
    backbone = make_sasa_resnet(depth=26, norm=norm, num_heads=2, out_features=["res5"])
    backbone(torch.randn(1, 3, 64, 64))["res5"].sum().backward()
    assert backbone.stem.attention.query_key_weight.grad.isfinite().all()


def test_unknown_parts_of_a_backbone_are_named():
    with pytest.raises(ValueError, match="stem must be one of conv, attention, but is 'pool'"):
        make_sasa_resnet(stem="pool")
    with pytest.raises(ValueError, match=r"attention_stages must be one of res2.*but is 'res6'"):
        make_sasa_resnet(attention_stages=("res6",))


def test_position_embeddings_do_not_decay():
    model = build_model(small("retinanet_full_attn", "MODEL.SASA.NUM_HEADS", "4"))
    optimizer = Trainer.build_optimizer(small("retinanet_full_attn"), model)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        is_embedding = name.rsplit(".", 1)[-1] in {"rel_rows", "row_embedding", "col_embedding"}
        if is_embedding:
            assert decay[id(parameter)] == 0, name
        elif name.endswith("projection.weight"):
            assert decay[id(parameter)] > 0, name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.RESNETS.DEPTH", "34"], "must be one of 26, 38, 50, 101, 152, but is 34"),
        (["MODEL.RESNETS.RES5_DILATION", "2"], "no dilated and no deformable stages"),
        (["MODEL.RETINANET.NORM", "BN"], "cannot be 'BN' in an attention head"),
    ],
)
def test_what_cannot_be_built_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(small("retinanet_full_attn", "MODEL.SASA.NUM_HEADS", "4", *overrides))


@pytest.mark.parametrize("config", ["retinanet_conv", "retinanet_full_attn"])
def test_folding_batch_norm_changes_no_prediction(config):
    model = build_model(small(config, "MODEL.SASA.NUM_HEADS", "4"))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    model.eval()
    folded = fold_batch_norm(model)
    norms = {
        n for n, m in folded.named_modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)
    }
    behind_attention = {
        n for n, _ in model.named_modules() if n.endswith(("attention_norm", "stem.norm"))
    }
    assert norms == (behind_attention if config == "retinanet_full_attn" else set())
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        features, wanted = folded.backbone(images), model.backbone(images)
    for name, feature in features.items():
        assert (feature - wanted[name]).norm() <= 1e-4 * wanted[name].norm()


def test_folding_keeps_the_dtype_of_the_weights():
    convolution = Conv2d(3, 4, 1, bias=False, norm=get_norm("BN", 4))
    convolution.weight.data = convolution.weight.data.bfloat16()
    folded = fold_batch_norm(convolution)
    assert folded.weight.dtype == folded.bias.dtype == torch.bfloat16


def draw_norms(block):
    """Norms of a block, with parameters and statistics of which none is what it starts with."""
    norms = [
        layer.norm for layer in (block.conv1, block.conv3, block.shortcut) if layer is not None
    ]
    norms.append(block.attention_norm)
    with torch.no_grad():
        for norm in norms:
            for name in ("running_mean", "running_var", "weight", "bias"):
                if hasattr(norm, name):
                    value = getattr(norm, name)
                    value.copy_(torch.randn(value.shape).abs() + 0.1)
            norm.weight[::2] *= -1
    return norms


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "GN"])
@pytest.mark.parametrize(
    ("in_channels", "stride", "residual"), [(16, 1, True), (16, 2, False), (64, 1, True)]
)
def test_a_bottleneck_without_gradients_computes_what_it_computes_with_them(
    in_channels, stride, residual, norm, layout, monkeypatch
):
    block = AttentionBottleneckBlock(
        in_channels,
        64,
        bottleneck_channels=32,
        stride=stride,
        norm=norm,
        num_heads=4,
        residual=residual,
    ).eval()
    norms = draw_norms(block)
    x = torch.randn(2, in_channels, 9, 13).contiguous(memory_format=layout)
    before = x.clone()
    wanted = block(x).detach()
    called = []
    hooks = [norm.register_forward_hook(lambda norm, *_: called.append(norm)) for norm in norms]
    with torch.no_grad():
        hooked = block(x)
        assert len(called) == len(norms)
        for hook in hooks:
            hook.remove()
        if norm != "GN":  # batch norms need not even be called
            for normalization in norms:
                monkeypatch.setattr(type(normalization), "forward", None)
        output = block(x)
    for actual in (hooked, output):
        assert (actual - wanted).norm() <= 1e-5 * wanted.norm()
    assert torch.equal(x, before)


def test_a_bottleneck_in_training_normalises_by_its_input_also_without_gradients():
    block = AttentionBottleneckBlock(16, 64, bottleneck_channels=32, num_heads=4)
    norms = draw_norms(block)
    x = torch.randn(2, 16, 9, 13)
    wanted = block(x).detach()
    means = [norm.running_mean.clone() for norm in norms]
    with torch.no_grad():
        torch.testing.assert_close(block(x), wanted)
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, means))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_adds_up_again_what_its_attention_keeps_anyway(
    stride, checkpointed, monkeypatch
):
    options = {"bottleneck_channels": 32, "stride": stride, "num_heads": 4}
    block = AttentionBottleneckBlock(16, 64, **options).double()
    draw_norms(block)
    sums = []
    watch = block.attention_norm.register_forward_pre_hook(
        lambda norm, inputs: sums.append(StorageWeakRef(inputs[0].untyped_storage()))
    )
    x = torch.randn(2, 16, 9, 13, dtype=torch.float64, requires_grad=True)
    leaves = [x, *block.parameters()]
    results = []
    for attention_keeps_its_output in (True, False):  # as on CUDA, and on the CPU
        monkeypatch.setattr(blocks, "keeps_output", lambda x: attention_keeps_its_output)  # noqa: B023
        output = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        # With a stride it is the pooled sum that the norm keeps.
        assert sums[-1].expired() == (checkpointed or (attention_keeps_its_output and stride == 1))
        # Two backwards: what was computed for one must not run out in the other.
        for _ in range(2):
            grads = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
        results.append([output, *grads])
    watch.remove()
    for actual, wanted in zip(*results):
        torch.testing.assert_close(actual, wanted)


def test_a_bottleneck_in_half_precision_keeps_norms_in_float32():
    block = AttentionBottleneckBlock(16, 64, bottleneck_channels=32, num_heads=4).eval()
    block.attention.bfloat16()
    for layer in (block.conv1, block.conv3, block.shortcut):
        layer.weight.data = layer.weight.data.bfloat16()
    x = torch.randn(2, 16, 9, 13, dtype=torch.bfloat16)
    with torch.no_grad():
        assert block(x).dtype == torch.bfloat16


def test_the_last_convolution_of_a_bottleneck_may_be_replaced():
    block = AttentionBottleneckBlock(16, 64, bottleneck_channels=32, num_heads=4).eval()
    x = torch.randn(1, 16, 9, 13)
    with torch.no_grad():
        wanted = block(x)
        block.conv3 = nn.Sequential(block.conv3)
        torch.testing.assert_close(block(x), wanted)
