"""Where users of a backbone package trip: what is wrong is said, and what to do."""

import logging
import re

import pytest
import torch

import sasa_det

# isort: split
from conftest import CONFIGS
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from sasa_det.config import load_config
from sasa_det.engine import Trainer, remedy_for_out_of_memory

IMAGENET = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
FREEZE, NORM = "MODEL.BACKBONE.FREEZE_AT is 2", "MODEL.RESNETS.NORM is FrozenBN"


def a_config(**changes):
    """detectron2's defaults with our backbone, as in a foreign project; small."""
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_backbone"
    cfg.MODEL.RESNETS.DEPTH = 26
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.RETINANET.IN_FEATURES = ["res4"]
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.MODEL.RESNETS.NORM = changes.get("norm", "FrozenBN")
    cfg.MODEL.BACKBONE.FREEZE_AT = changes.get("freeze_at", 2)
    cfg.MODEL.WEIGHTS = changes.get("weights", "")
    cfg.MODEL.SASA.STEM = changes.get("stem", "attention")
    cfg.MODEL.SASA.ATTENTION_STAGES = changes.get("stages", ("res2", "res3", "res4", "res5"))
    return cfg


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of the model with attention, and of the one without."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, stages, stem in [("attention", ("res3",), "conv"), ("convolution", (), "conv")]:
        model = build_model(a_config(stages=stages, stem=stem, norm="BN", freeze_at=0))
        torch.save({"model": model.state_dict()}, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize(
    ("changes", "causes"),
    [
        ({}, [FREEZE, NORM, "MODEL.WEIGHTS is empty"]),
        ({"freeze_at": 0}, [NORM]),
        ({"norm": "BN"}, [FREEZE]),
        ({"weights": IMAGENET}, [FREEZE, NORM, f"{IMAGENET!r}, a model without attention"]),
        ({"weights": "convolution.pth"}, [FREEZE, NORM, "a model without attention"]),
        # What is frozen was in the checkpoint.
        ({"weights": IMAGENET, "stem": "conv", "stages": ("res5",), "norm": "BN"}, []),
        ({"weights": IMAGENET, "stem": "conv", "stages": ()}, []),
        ({"weights": "attention.pth"}, []),
        ({"freeze_at": 0, "norm": "SyncBN"}, []),
    ],
    ids=str,
)
def test_frozen_random_weights_are_warned_of_in_any_project(
    changes, causes, checkpoints, caplog, monkeypatch
):
    # A trainer of an earlier test may have given detectron2's logger handlers of its own; pytest
    # may then see each record twice.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    if changes.get("weights", "").endswith(".pth"):
        changes = {**changes, "weights": str(checkpoints / changes["weights"])}
    with caplog.at_level(logging.WARNING):
        DefaultTrainer.build_model(a_config(**changes))
    warnings = {r.getMessage() for r in caplog.records if r.levelno == logging.WARNING}
    assert len(warnings) == bool(causes)
    for warning in warnings:
        assert all(cause in warning for cause in causes)
        assert "set MODEL.BACKBONE.FREEZE_AT to 0 and MODEL.RESNETS.NORM to SyncBN" in warning


def test_a_config_without_our_keys_says_which_call_is_missing():
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_fpn_backbone"
    with pytest.raises(ValueError, match=r"call sasa_det.add_sasa_config\(cfg\)"):
        build_model(cfg)


def test_out_of_memory_points_to_checkpointing_and_the_batch_size(tmp_path):
    overrides = ["DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(CONFIGS / "demo.yaml"), overrides)

    class OnHugeImages(Trainer):
        @classmethod
        def build_train_loader(cls, cfg):
            # More bytes than a processor can address, without occupying any.
            image = torch.empty(1, 1, 1).expand(3, 10**7, 10**7)
            instances = Instances((10**7, 10**7))
            instances.gt_boxes = Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]]))
            instances.gt_classes = torch.tensor([0])
            return [[{"image": image, "instances": instances}]]

    with pytest.raises(RuntimeError, match=r"ACTIVATION_CHECKPOINTING.*SOLVER.IMS_PER_BATCH"):
        OnHugeImages(cfg).train()


@pytest.mark.parametrize(
    ("error", "has_remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("shapes do not match"), False),
    ],
    ids=["cuda", "another"],
)
def test_only_a_lack_of_memory_gets_the_remedy(error, has_remedy):
    message = re.escape(str(error))
    with (
        pytest.raises(type(error), match=rf"Out of memory: .*{message}" if has_remedy else message),
        remedy_for_out_of_memory(),
    ):
        raise error
