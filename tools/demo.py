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
from matplotlib.patches import Rectangle
from torch import Tensor, nn

import sasa_det  # noqa: F401  (registers models and datasets; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, build_detection_test_loader
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

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
        left, top, right, bottom = box
        axis.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="lime", lw=1.5)
        )
        text = f"{int(digit)}: {score:.0%}"
        label = {"facecolor": "lime", "edgecolor": "none", "pad": 1}
        axis.text(left, top, text, fontsize=7, va="bottom", bbox=label, clip_on=True)


def draw_attention(axes: np.ndarray, model: nn.Module, sample: dict, detection: Instances) -> None:
    """What each head of the classifier's last attention attends to from the detection's centre."""
    weights, stride = head_attention(model, sample)  # (heads, k * k, H, W)
    heads, window, height, width = weights.shape
    radius = int(window**0.5) // 2
    x, y = detection.pred_boxes.get_centers()[0].tolist()
    row, col = min(int(y / stride), height - 1), min(int(x / stride), width - 1)
    image = rgb(sample)
    draw_detections(axes[0], sample, detection)
    axes[0].plot(x, y, "r+", markersize=12, markeredgewidth=2)
    axes[0].set_title("from the red cross:", fontsize=9)
    for head, axis in zip(range(heads), axes[1:]):
        heat = np.zeros((height + 2 * radius, width + 2 * radius))
        window_at = weights[head, :, row, col].reshape(2 * radius + 1, -1)
        heat[row : row + 2 * radius + 1, col : col + 2 * radius + 1] = window_at
        heat = heat[radius : radius + height, radius : radius + width]
        axis.imshow(image)
        extent = (0, width * stride, height * stride, 0)
        strength = 0.85 * heat / heat.max()  # the picture shows through where little is looked at
        axis.imshow(heat, extent=extent, cmap="autumn", alpha=strength, interpolation="nearest")
        axis.set_title(f"head {head + 1}, {heat.max():.0%} at most", fontsize=9)


def head_attention(model: nn.Module, sample: dict) -> tuple[np.ndarray, int]:
    """The attention of the last layer of the class tower on its finest level, and its stride."""
    attention = model.head.cls_subnet[-1].attention
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model([sample])
        weights = attention.attention_weights(inputs[0])[0]
    hook.remove()
    stride = model.backbone.output_shape()[model.head_in_features[0]].stride
    return weights.cpu().numpy(), stride


def rgb(sample: dict) -> np.ndarray:
    """The picture of a sample, which detectron2 keeps as BGR, channels first."""
    return sample["image"].flip(0).permute(1, 2, 0).numpy()


if __name__ == "__main__":
    main()
