"""Real COCO images, where the slice of COCO is present."""

import json

import torch
from test_training import AP_NAMES, train_net


def test_the_full_size_model_trains_resumes_and_evaluates_on_the_cpu(coco_slice, tmp_path):
    """The paper's full attention RetinaNet at 640x640, as a user of detectron2 would start it."""
    command = ["--config", "configs/retinanet_full_attn.yaml"]
    options = ["SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 1, "OUTPUT_DIR", tmp_path]
    untested = ["DATASETS.TEST", "()", *options]
    first = train_net(*command, *untested, "SOLVER.MAX_ITER", 3, datasets=coco_slice)
    resumed = train_net(*command, "--resume", *untested, "SOLVER.MAX_ITER", 4, datasets=coco_slice)
    weights = tmp_path / "model_final.pth"
    assert torch.load(weights, weights_only=True)["iteration"] == 3
    run = train_net(*command, "--eval-only", "MODEL.WEIGHTS", weights, datasets=coco_slice)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in run.stdout + run.stderr
    results = json.loads((tmp_path / "evaluation.json").read_text())
    figures = results["coco_2017_val"]["bbox"]
    assert all(figures[name] is not None for name in AP_NAMES)
    assert max(r.peak_memory for r in (first, resumed, run)) < 12e9


def test_a_small_full_attention_model_learns_eight_real_images_by_heart(
    eight_coco_images, tmp_path
):
    """Gradients reach everything: the model finds again what it has seen."""
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
        datasets=eight_coco_images,
    )
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["coco_2017_val"]["bbox"]["AP50"] > 90
