#!/usr/bin/env python
"""Runs a trained detector over images, draws what it finds and writes it as COCO does.

    python tools/predict.py photo.jpg --config configs/demo.yaml \
        MODEL.WEIGHTS output/demo/model_final.pth
    python tools/predict.py photos "more/*.png" --config configs/demo.yaml --output found \
        MODEL.WEIGHTS output/demo/model_final.pth

Images are files, folders and patterns. In --output: each image with the boxes, masks and class
names of its detections; results.json, all detections in COCO's format for results; images.json, the
images that their ids stand for, which pycocotools loads as a dataset. With --annotations the ids
are those of a COCO annotation file, against which results.json can be evaluated. Any config of
detectron2 works; any of its keys can be changed at the end of the command.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import sasa_det  # noqa: F401  (registers models and datasets; before detectron2, see compat.py)

# isort: split
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from PIL import Image

from sasa_det.data import build_test_mapper
from sasa_det.prediction import (
    categories_of,
    find_pictures,
    image_ids,
    load_metadata,
    load_model,
    output_names,
    prediction_config,
    read_annotations,
    split_overrides,
)
from sasa_det.whole_files import check_overwriting, make_folder_of

try:
    from detectron2.utils.visualizer import Visualizer
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: detectron2 draws with {missing.name}, which is not installed; "
        "pip install opencv-python-headless matplotlib"
    )


def main(args: argparse.Namespace, overrides: list[str]) -> list[str]:
    """The paths of the images that could not be used."""
    cfg = prediction_config(args.config, overrides)
    paths = find_pictures(args.images)
    output = Path(args.output)
    drawn = {path: output / name for path, name in output_names(paths).items()}
    annotations = read_annotations(args.annotations) if args.annotations else None
    written = [*drawn.values(), *Predictions.files(output)]
    check_overwriting([*paths, *filter(None, [args.annotations])], written)
    ids = image_ids(paths, annotations)
    metadata = load_metadata(cfg, annotations)
    predictions = Predictions(metadata)
    make_folder_of(*written)
    model, mapper = load_model(cfg), build_test_mapper(cfg)
    failed = []
    try:
        for path in tqdm(paths, unit="image"):
            try:
                sample = mapper({"file_name": path})
            except ValueError as error:
                tqdm.write(f"error: {error}", file=sys.stderr)
                failed.append(path)
                continue
            instances = predict(model, sample)
            name = str(drawn[path].relative_to(output))
            predictions.add(instances, ids[path], name, sample["width"], sample["height"])
            draw(path, instances[instances.scores >= args.score_threshold], metadata, drawn[path])
    finally:  # what is found before an interruption is kept
        if predictions.images:
            predictions.write(output)
    return failed


class Predictions:
    """What becomes ``results.json`` and ``images.json``."""

    def __init__(self, metadata: Metadata) -> None:
        self.categories = categories_of(metadata)
        self.named = bool(self.categories)
        self.images: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        if not self.named:
            print("The names of the classes are not known: their numbers are drawn and written.")

    def add(
        self, instances: Instances, image_id: int, file_name: str, width: int, height: int
    ) -> None:
        """The detections of one image.

        Raises:
            ValueError: for a class that the dataset does not have.
        """
        for result in instances_to_coco_json(instances, image_id):
            number = result["category_id"]
            if not self.named:
                self.categories.setdefault(number, {"id": number, "name": f"class {number}"})
            elif number not in self.categories:
                raise ValueError(
                    f"The model found something of class {number}, but the dataset has only "
                    f"{len(self.categories)} classes; set DATASETS.TEST to the one that the model "
                    "was trained for, or give its --annotations."
                )
            self.results.append({**result, "category_id": self.categories[number]["id"]})
        size = {"width": width, "height": height}
        self.images.append({"id": image_id, "file_name": file_name, **size})

    @staticmethod
    def files(folder: Path) -> tuple[Path, Path]:
        return folder / "results.json", folder / "images.json"

    def write(self, folder: Path) -> None:
        categories = sorted(self.categories.values(), key=lambda category: category["id"])
        images = {"images": self.images, "annotations": [], "categories": categories}
        for file, content in zip(self.files(folder), (self.results, images)):
            file.write_text(json.dumps(content) + "\n")
        print(f"{len(self.results)} detections on {len(self.images)} images: {folder}")


@torch.no_grad()
def predict(model: torch.nn.Module, sample: dict[str, Any]) -> Instances:
    """The detections on one image, in its pixels.

    Raises:
        ValueError: if the model makes none.
    """
    (output,) = model([sample])
    if "instances" not in output:
        raise ValueError(f"The model finds no objects, but {', '.join(output)}; choose a detector.")
    return output["instances"].to("cpu")


def draw(path: str, instances: Instances, metadata: Metadata, target: Path) -> None:
    drawing = Visualizer(read_image(path, "RGB"), metadata).draw_instance_predictions(instances)
    Image.fromarray(drawing.get_image()).save(target)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES", help="files, folders and patterns; then overrides"
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="of the trained model")
    parser.add_argument("--output", default="output/predictions", metavar="FOLDER")
    parser.add_argument(
        "--score-threshold",
        type=float,
        default=0.5,
        help="draw what is as sure; results.json has all that SCORE_THRESH_TEST of the config "
        "lets through (default: 0.5)",
    )
    parser.add_argument(
        "--annotations", metavar="FILE", help="COCO annotations whose image and category ids to use"
    )
    args = parser.parse_intermixed_args()
    args.images, overrides = split_overrides(args.images)
    return args, overrides


if __name__ == "__main__":
    try:
        unread = main(*parse_args())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    if unread:
        sys.exit(f"error: {len(unread)} of the images could not be used: {', '.join(unread)}")
