"""detectron2's detectors on the attention backbones: they build, train and detect."""

import json
from pathlib import Path

import pytest
import torch

import sasa_det

# isort: split
from conftest import CONFIGS
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from detectron2.utils.events import EventStorage
from test_training import AP_NAMES, train_net

from sasa_det.config import load_config
from sasa_det.layers import LocalSelfAttention2d

NUM_CLASSES, NUM_STUFF_CLASSES = 5, 4
# A width that is quick to run; the structure stays.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.SASA.NUM_HEADS": 4,
    "MODEL.SASA.KERNEL_SIZE": 3,
    "MODEL.RESNETS.DEPTH": 26,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RETINANET.NUM_CLASSES": NUM_CLASSES,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 1,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
}
CASCADE = {
    "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
}
KEYPOINTS = {
    "MODEL.KEYPOINT_ON": True,
    "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 3,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": (32,),
}
PANOPTIC = {
    "MODEL.META_ARCHITECTURE": "PanopticFPN",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": NUM_STUFF_CLASSES,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": 0.5,
}
# Detector: config, overrides, what inference returns.
DETECTORS = {
    "RetinaNet": ("retinanet_convstem_attn_backbone", {"MODEL.META_ARCHITECTURE": "RetinaNet"}, ()),
    "Faster R-CNN": ("faster_rcnn_attn", {}, ()),
    "Mask R-CNN": ("mask_rcnn_attn", {}, ("pred_masks",)),
    "Cascade R-CNN": ("faster_rcnn_attn", CASCADE, ()),
    "Cascade Mask R-CNN": ("mask_rcnn_attn", CASCADE, ("pred_masks",)),
    "Keypoint R-CNN": ("faster_rcnn_attn", KEYPOINTS, ("pred_keypoints",)),
    "Panoptic FPN": ("mask_rcnn_attn", PANOPTIC, ("pred_masks",)),
}


def small(config, overrides=()):
    pairs = {**SMALL, **dict(overrides)}.items()
    return load_config(str(CONFIGS / f"{config}.yaml"), [str(x) for pair in pairs for x in pair])


def a_sample(height, width):
    """An image with two objects, annotated in every way that detectron2 knows."""
    boxes = torch.tensor([[10.0, 20.0, 60.0, 70.0], [30.0, 5.0, 50.0, 45.0]])
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.tensor([3, 0])
    corners = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes.tolist()]
    instances.gt_masks = PolygonMasks([[corner] for corner in corners])
    points = torch.stack([boxes[:, :2] + 2, boxes[:, 2:] - 2, boxes[:, :2] + 9], dim=1)
    instances.gt_keypoints = Keypoints(torch.cat([points, torch.full((2, 3, 1), 2.0)], dim=2))
    return {
        "image": torch.rand(3, height, width) * 255,
        "instances": instances,
        "sem_seg": torch.randint(NUM_STUFF_CLASSES, (height, width)),
    }


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_trains_all_its_parameters_and_detects(name):
    config, overrides, fields = DETECTORS[name]
    model = build_model(small(config, overrides)).train()
    assert any(isinstance(m, LocalSelfAttention2d) for m in model.backbone.modules())
    with EventStorage():
        losses = model([a_sample(96, 128), a_sample(75, 90)])
    for key, loss in losses.items():
        assert loss.isfinite(), key
    sum(losses.values()).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad.any(), key
    with torch.no_grad():
        (output,) = model.eval()([{**a_sample(75, 90), "height": 150, "width": 180}])
    instances = output["instances"]
    assert instances.image_size == (150, 180)
    assert all(instances.has(field) for field in ("pred_boxes", "scores", *fields))
    if name != "RetinaNet":  # which is sure of nothing before it has learnt
        assert len(instances)
    if name == "Panoptic FPN":
        assert output["sem_seg"].shape == (NUM_STUFF_CLASSES, 150, 180)
        assert output["panoptic_seg"][0].shape == (150, 180)


# What is in the name of a config, and what is said of it.
REFUSED = {
    "DC5": "no dilated and no deformable",
    "X_101_32x8d": "NUM_GROUPS is 32, .* set NUM_GROUPS to 1 and WIDTH_PER_GROUP to 64",
}


def zoo_configs():
    """Those of detectron2's own configs that have a ResNet; the package on PyPI lacks them."""
    folder = Path(model_zoo.__file__).parent / "configs"
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.glob("COCO-*/*.yaml")))
    return [name for name in names if "Base-" not in name] or ["none"]


@pytest.mark.parametrize("name", zoo_configs())
def test_detectron2s_own_configs_build_with_only_the_backbones_name_changed(name):
    if name == "none":
        pytest.skip("this installation of detectron2 has no model zoo")
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    cfg.merge_from_file(model_zoo.get_config_file(name))
    # Their names follow detectron2's.
    theirs = cfg.MODEL.BACKBONE.NAME
    cfg.MODEL.BACKBONE.NAME = theirs.replace("resnet", "sasa_resnet")
    cfg.MODEL.DEVICE = "meta"
    for part, refusal in REFUSED.items():
        if part in name:
            with torch.device("meta"), pytest.raises(ValueError, match=refusal):
                build_model(cfg)
            return
    with torch.device("meta"):
        ours = build_model(cfg)
        cfg.MODEL.BACKBONE.NAME = theirs
        original = build_model(cfg)
    assert ours.backbone.output_shape() == original.backbone.output_shape()
    assert any(isinstance(m, LocalSelfAttention2d) for m in ours.backbone.modules())
    outside = [
        {name: x.shape for name, x in model.state_dict().items() if "backbone" not in name}
        for model in (ours, original)
    ]
    assert outside[0] == outside[1]


@pytest.mark.parametrize(
    ("config", "tasks"), [("faster_rcnn_attn", {"bbox"}), ("mask_rcnn_attn", {"bbox", "segm"})]
)
def test_rcnns_train_and_evaluate_on_real_images(config, tasks, eight_coco_images, tmp_path):
    small = {**SMALL, "INPUT.IMAGE_SIZE": 128, "INPUT.MIN_SIZE_TEST": 128}
    small.pop("MODEL.ROI_HEADS.NUM_CLASSES")
    train_net(
        *("--config", f"configs/{config}.yaml", "OUTPUT_DIR", tmp_path),
        *(x for pair in small.items() for x in pair),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "DATALOADER.NUM_WORKERS", 0),
        datasets=eight_coco_images,
    )
    results = json.loads((tmp_path / "evaluation.json").read_text())["coco_2017_val"]
    assert set(results) == tasks
    for figures in results.values():
        # All objects of these images are large.
        assert {name for name in AP_NAMES if figures[name] is None} == {"APs", "APm"}
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert ("loss_mask" in metrics[0]) == ("segm" in tasks)
