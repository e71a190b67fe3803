"""Real COCO images, where the slice of COCO is present."""

import json

import pytest
import torch
from test_training import AP_NAMES, losses, train_net


@pytest.fixture(scope="module")
def trained(coco_slice, tmp_path_factory):
    """The paper's full attention model at full size, four steps on real images."""
    folder = tmp_path_factory.mktemp("full")
    arguments = [
        *("--config", "configs/retinanet_full_attn.yaml", "SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 4, "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", folder),
    ]
    train_net(*arguments, datasets=coco_slice)
    return folder, arguments


def test_the_full_size_model_trains_and_prints_all_six_figures(trained):
    folder, _ = trained
    results = json.loads((folder / "evaluation.json").read_text())
    figures = results["coco_2017_val"]["bbox"]
    assert AP_NAMES <= set(figures)
    assert all(figures[name] is not None for name in AP_NAMES)
    assert torch.load(folder / "model_final.pth", weights_only=True)["iteration"] == 3


def test_a_small_full_attention_model_learns_eight_real_images_by_heart(coco_slice, tmp_path):
    """Gradients reach everything: the model finds again what it has seen."""
    root = tmp_path / "coco"
    annotations = coco_slice / "coco" / "annotations" / "instances_train2017.json"
    subset = eight_images(json.loads(annotations.read_text()))
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / f"{split}2017").symlink_to(coco_slice / "coco" / "train2017")
        path = root / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(subset))
    train_net(
        *("--config", "configs/retinanet_full_attn.yaml", "OUTPUT_DIR", tmp_path / "out"),
        *("MODEL.RESNETS.DEPTH", 26, "MODEL.RESNETS.WIDTH_PER_GROUP", 16),
        *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 16),
        *("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.RETINANET.NUM_CONVS", 2),
        *("MODEL.SASA.NUM_HEADS", 4, "INPUT.IMAGE_SIZE", 0, "INPUT.RANDOM_FLIP", "none"),
        *("INPUT.MIN_SIZE_TRAIN", "(192,)", "INPUT.MAX_SIZE_TRAIN", 192),
        *("INPUT.MIN_SIZE_TEST", 192, "INPUT.MAX_SIZE_TEST", 192),
        *("DATALOADER.NUM_WORKERS", 0, "DATALOADER.ASPECT_RATIO_GROUPING", False),
        *("SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", 0.003, "SOLVER.IMS_PER_BATCH", 4),
        *("SOLVER.WARMUP_ITERS", 30, "SOLVER.MAX_ITER", 300, "SEED", 1),
        datasets=tmp_path,
    )
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["coco_2017_val"]["bbox"]["AP50"] > 90


def eight_images(content):
    """The eight images whose smallest object is the largest: few pixels are left at this size."""
    smallest = {}
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        smallest[image_id] = min(smallest.get(image_id, float("inf")), annotation["area"])
    chosen = set(sorted(smallest, key=smallest.__getitem__, reverse=True)[:8])
    return {
        **content,
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
    }
