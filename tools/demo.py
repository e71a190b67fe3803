#!/usr/bin/env python
"""Trains a small detector, attentional from stem to head, and draws what it sees.

    make demo

Minutes on two CPU cores, nothing to download: the pictures are generated. Leaves the checkpoint,
the COCO figures on unseen pictures as JSON, and a PNG with detections and an attention map.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import nn

import sasa_det  # noqa: F401  (registers models and datasets; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from sasa_det.analysis.attention import look
from sasa_det.analysis.attention_figures import draw_box, draw_window
from sasa_det.config import load_config
from sasa_det.engine import Trainer
from sasa_det.evaluation import AP_NAMES, RESULTS_FILE

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = Path(__file__).parent.parent / "configs" / "demo.yaml"
NUM_PICTURES = 5
MIN_SCORE = 0.4


def main() -> None:
    cfg = load_config(str(CONFIG))
    output = Path(cfg.OUTPUT_DIR)
    output.mkdir(parents=True, exist_ok=True)
    setup_logger(str(output))
    seed_all_rng(cfg.SEED)
    trainer = Trainer(cfg)
    trainer.train()
    (results,) = json.loads((output / RESULTS_FILE).read_text()).values()
    figures = "  ".join(f"{name} {results['bbox'][name]:.1f}" for name in AP_NAMES)
    number = len(DatasetCatalog.get(cfg.DATASETS.TEST[0]))
    print(f"\nOn {number} unseen pictures: {figures}")
    draw(cfg, trainer.model.eval(), output / "detections.png")
    print(f"Detections and an attention map: {output / 'detections.png'}")
    print(f"Figures: {output / RESULTS_FILE}; checkpoint: {output / 'model_final.pth'}")


def draw(cfg: CfgNode, model: nn.Module, path: Path) -> None:
    """Unseen pictures with detections; below, where the head looks from the surest of them."""
    samples = pictures_with_detections(cfg, model)
    figure, axes = plt.subplots(2, NUM_PICTURES, figsize=(2.4 * NUM_PICTURES, 5.2))
    for axis in axes.flat:
        axis.axis("off")
    shown = list(itertools.islice(samples, NUM_PICTURES))
    if not shown:
        raise RuntimeError(f"The model is nowhere surer than {MIN_SCORE:.0%}: nothing to draw.")
    for axis, (sample, instances) in zip(axes[0], shown):
        draw_detections(axis, sample, instances)
    sample, instances = max(shown, key=lambda pair: float(pair[1].scores[0]))
    draw_attention(axes[1], model, sample, instances[:1])
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def pictures_with_detections(cfg: CfgNode, model: nn.Module) -> Iterator[tuple[dict, Instances]]:
    """Samples of the validation set on which the model is sure of something, surest first."""
    for (sample,) in build_detection_test_loader(cfg, cfg.DATASETS.TEST[0]):
        with torch.no_grad():
            instances = model([sample])[0]["instances"].to("cpu")
        instances = instances[instances.scores > MIN_SCORE]
        if len(instances):
            yield sample, instances


def draw_detections(axis: plt.Axes, sample: dict, instances: Instances) -> None:
    axis.imshow(rgb(sample))
    for box, score, digit in zip(
        instances.pred_boxes.tensor.tolist(), instances.scores, instances.pred_classes
    ):
        draw_box(axis, box, f"{int(digit)}: {score:.0%}")


def draw_attention(axes: np.ndarray, model: nn.Module, sample: dict, detection: Instances) -> None:
    """What each head of the class tower's attention attends to from the detection's centre."""
    x, y = detection.pred_boxes.get_centers()[0].tolist()
    weights, extent = look(model, sample, "head.cls_subnet.0.attention").window((x, y))
    draw_detections(axes[0], sample, detection)
    axes[0].plot(x, y, "r+", markersize=12, markeredgewidth=2)
    axes[0].set_title("from the red cross:", fontsize=9)
    for head, (axis, by_head) in enumerate(zip(axes[1:], weights), start=1):
        draw_window(axis, rgb(sample), by_head, extent, weights.max())
        axis.set_title(f"head {head}, {by_head.max():.0%} at most", fontsize=9)


def rgb(sample: dict) -> np.ndarray:
    """The picture of a sample, which detectron2 keeps as BGR, channels first."""
    return sample["image"].flip(0).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
