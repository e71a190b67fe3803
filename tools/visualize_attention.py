#!/usr/bin/env python
"""Draws what the attention of a detector looks at, over an image.

    python tools/visualize_attention.py photo.jpg --config configs/demo.yaml \
        MODEL.WEIGHTS output/demo/model_final.pth
    python tools/visualize_attention.py photo.jpg --config configs/demo.yaml \
        --points 120,80 40,200 --layer backbone.bottom_up.res5.0.attention \
        MODEL.WEIGHTS output/demo/model_final.pth

Three pages in --output: heads.png, what each head of a layer attends to from some points;
layers.png, which places every layer attends to, averaged over its heads and over all points that
look; embeddings.png, the row and column embeddings that the layer has learned. Any config key can
be changed at the end of the command.
"""

import argparse
import sys
from pathlib import Path

import torchvision

import sasa_det  # noqa: F401  (registers models and datasets; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.env import seed_all_rng
from torch import nn

from sasa_det.analysis.attention import look
from sasa_det.analysis.attention_figures import (
    Point,
    View,
    draw_embeddings,
    draw_heads,
    draw_layers,
)
from sasa_det.data import build_test_mapper
from sasa_det.layers import attention_layers
from sasa_det.prediction import (
    class_label,
    load_metadata,
    load_model,
    prediction_config,
    split_overrides,
)
from sasa_det.whole_files import check_overwriting, make_folder_of

NUM_DETECTIONS = 3


def main(args: argparse.Namespace, overrides: list[str]) -> None:
    cfg = prediction_config(args.config, overrides)
    sample = build_test_mapper(cfg)({"file_name": args.image})
    points = [parse_point(text, sample["width"], sample["height"]) for text in args.points]
    output = Path(args.output)
    pages = [output / name for name in ("heads.png", "layers.png", "embeddings.png")]
    heads, layers, embeddings = pages
    check_overwriting([args.image], pages)
    make_folder_of(*pages)
    model = load_model(cfg)
    layer = args.layer or default_layer(model)
    models = {"": model}
    if args.before_training:
        models = {"before training": build_untrained(cfg), "after training": model}
    looks = {when: look(each, sample, layer) for when, each in models.items()}
    seen = list(looks.values())[-1]
    points = points or detected_points(seen.instances, load_metadata(cfg))
    views = [
        View(when or point.label, point, each.window((point.x, point.y), args.level))
        for point in points
        for when, each in looks.items()
    ]
    picture = read_image(args.image, "RGB")
    title = f"What the heads of {layer} attend to from the cross, in the frame"
    written = draw_heads(picture, views, title, heads)
    title = "Which places each layer attends to, over its heads and all points it attends from"
    written.append(draw_layers(picture, seen, title, layers))
    if seen.layer.rel_rows is None:
        print(f"No embeddings.png: {layer} attends without relative positions.")
    else:
        tables = {when: each.layer for when, each in looks.items()}
        title = f"The position embeddings of {layer}, by the offset in positions"
        written.append(draw_embeddings(tables, title, embeddings))
    print(*written, sep="\n")


def parse_point(text: str, width: int, height: int) -> Point:
    """ "x,y" in pixels of an image.

    Raises:
        ValueError: if it is none, or lies outside.
    """
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"A point is x,y in pixels, such as 120,80, but not {text!r}.") from None
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(
            f"The point {text} lies outside the image, which is {width} pixels wide and {height} "
            f"high; choose x from 0 to {width - 1} and y from 0 to {height - 1}."
        )
    return Point(x, y, label=f"({text})")


def detected_points(instances: Instances | None, metadata: Metadata) -> list[Point]:
    """The centres of the surest detections, each object once.

    Raises:
        ValueError: if there are none.
    """
    if instances is None or not len(instances):
        raise ValueError(
            "The model detects nothing on the image; say with --points x,y where to look from."
        )
    kept = torchvision.ops.nms(instances.pred_boxes.tensor, instances.scores, 0.5)
    shown = instances[kept[:NUM_DETECTIONS]]
    labels = [
        class_label(metadata, number, score)
        for number, score in zip(shown.pred_classes.tolist(), shown.scores.tolist())
    ]
    boxes = shown.pred_boxes
    return [
        Point(*centre, box, label)
        for centre, box, label in zip(boxes.get_centers().tolist(), boxes.tensor.tolist(), labels)
    ]


def default_layer(model: nn.Module) -> str:
    """The last attention before the classes are told, or of the backbone.

    Raises:
        ValueError: if nothing in the model attends.
    """
    names = list(attention_layers(model))
    if not names:
        raise ValueError("The model has no attention layer; choose a config that has.")
    return next((name for name in reversed(names) if ".cls_subnet." in f".{name}"), names[-1])


def build_untrained(cfg: CfgNode) -> nn.Module:
    """The model as a training with the config's SEED starts."""
    seed_all_rng(max(cfg.SEED, 0))
    return build_model(cfg.clone()).eval()


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("image", nargs="+", metavar="IMAGE", help="then the config's overrides")
    parser.add_argument("--config", required=True, metavar="FILE", help="of the trained model")
    parser.add_argument(
        *("--points", "--point"),
        nargs="+",
        default=[],
        metavar="X,Y",
        help="in pixels of the image; by default the centres of the surest detections",
    )
    parser.add_argument("--layer", metavar="NAME", help="by default the class tower's last one")
    parser.add_argument(
        "--level", type=int, default=0, help="of a head that several FPN levels share; 0 the finest"
    )
    parser.add_argument(
        "--before-training",
        action="store_true",
        help="draw beside it what the model attended to before its training",
    )
    parser.add_argument("--output", default="output/attention", metavar="FOLDER")
    args = parser.parse_intermixed_args()
    images, overrides = split_overrides(args.image)
    args.points, after_points = split_overrides(args.points)
    if len(images) != 1:
        parser.error(f"one image is looked at, but {len(images)} are given")
    args.image = images[0]
    return args, overrides + after_points


if __name__ == "__main__":
    arguments = parse_args()
    try:
        main(*arguments)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
