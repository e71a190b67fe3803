"""retinanet_full_attn_fpn.yaml as a LazyConfig: every class takes plain keyword arguments.

    python docs/outside_project/lazyconfig_train_net.py --config-file configs/lazy/retinanet_attn.py

Any value can be changed at the end of the command: train.max_iter=100 optimizer.lr=0.01
"""

import torch

import sasa_det  # noqa: F401  (before detectron2, see sasa_det/compat.py)

# isort: split
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from sasa_det.data.mapper import SquareCut
from sasa_det.evaluation import InstanceEvaluator
from sasa_det.modeling import (
    AttentionFPN,
    AttentionRetinaNetHead,
    SASARetinaNet,
    make_sasa_resnet,
)
from sasa_det.optimizer import optimizer_params

size = 640

model = L(SASARetinaNet)(
    backbone=L(AttentionFPN)(
        bottom_up=L(make_sasa_resnet)(
            depth=50,
            stem="attention",
            attention_stages=["res2", "res3", "res4", "res5"],
            kernel_size=7,
            num_heads=8,
            norm="SyncBN",
            out_features=["res3", "res4", "res5"],
            freeze_at=0,
        ),
        in_features="${.bottom_up.out_features}",
        out_channels=256,
        top_block=L(LastLevelP6P7)(
            in_channels="${..out_channels}", out_channels="${..out_channels}", in_feature="p5"
        ),
        kernel_size=7,
        num_heads=8,
    ),
    head=L(AttentionRetinaNetHead)(
        input_shape=[L(ShapeSpec)(channels="${....backbone.out_channels}") for _ in range(5)],
        num_classes="${..num_classes}",
        num_anchors=6,
        conv_dims=[256, 256, 256, 256],
        kernel_size=7,
        num_heads=8,
    ),
    anchor_generator=L(DefaultAnchorGenerator)(
        sizes=[[x, x * 2**0.5] for x in (32, 64, 128, 256, 512)],
        aspect_ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128],
        offset=0.0,
    ),
    box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
    anchor_matcher=L(Matcher)(
        thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True
    ),
    num_classes=80,
    head_in_features=["p3", "p4", "p5", "p6", "p7"],
    smooth_l1_beta=0.1,
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[57.375, 57.12, 58.395],
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train"),
        mapper=L(DatasetMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeScale)(
                    min_scale=0.5, max_scale=2.0, target_height=size, target_width=size
                ),
                L(SquareCut)(crop_size=[size, size]),
                L(T.RandomFlip)(),
            ],
            image_format="BGR",
        ),
        total_batch_size=64,
        num_workers=8,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DatasetMapper)(
            is_train=False,
            augmentations=[L(T.ResizeShortestEdge)(short_edge_length=size, max_size=size)],
            image_format="BGR",
        ),
        num_workers=8,
    ),
    "evaluator": L(InstanceEvaluator)(dataset_name="${..test.dataset.names}"),
}

optimizer = L(torch.optim.SGD)(
    params=L(optimizer_params)(weight_decay_norm=0.0),  # and position embeddings do not decay
    lr=0.04,
    momentum=0.9,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_factor=0.001,
    warmup_length=2000 / 135000,
    warmup_method="linear",
)
train = {
    "output_dir": "output/retinanet_attn",
    "init_checkpoint": "",
    "max_iter": 135000,
    "eval_period": 9000,
    "checkpoint_period": 5000,
    "log_period": 20,
    "device": "cuda",
}
