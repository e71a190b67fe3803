"""Trained models on single images: configs, weights and images as the tools take them."""

import contextlib
import glob
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from sasa_det.checkpoint import StrictCheckpointer, check_weights
from sasa_det.config import load_config

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands on a command line before the config's overrides, and these."""
    sections = get_cfg().keys()
    for index, argument in enumerate(arguments):
        if argument.split(".")[0] in sections and not Path(argument).exists():
            return list(arguments[:index]), list(arguments[index:])
    return list(arguments), []


def prediction_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    """The frozen, checked config of a trained model, on the CPU where there is no GPU.

    Raises:
        FileNotFoundError, ValueError: with one sentence for the user.
    """
    cfg = load_config(config_file, overrides)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("The checkpoint is missing: add MODEL.WEIGHTS FILE at the end.")
    check_weights(cfg.MODEL.WEIGHTS, cfg)
    cfg.defrost()
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    return cfg


def load_model(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg`` with all of its weights, in evaluation mode.

    Raises:
        ValueError: if the checkpoint cannot be read, or lacks what the model has.
    """
    model = build_model(cfg.clone()).eval()
    try:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"The checkpoint {cfg.MODEL.WEIGHTS!r} of MODEL.WEIGHTS cannot be read: {reason}"
        ) from error
    return model


def find_pictures(where: Sequence[str]) -> list[str]:
    """The paths of images, sorted, each once: files, those directly in folders, and patterns.

    Raises:
        FileNotFoundError: for a name or pattern of nothing, and for a folder without images.
    """
    found: dict[str, str] = {}
    for name in where:
        if Path(name).is_dir():
            paths = [str(p) for p in Path(name).iterdir() if p.suffix.lower() in PICTURE_SUFFIXES]
        else:
            paths = [name] if Path(name).is_file() else glob.glob(name, recursive=True)
            paths = [path for path in paths if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(
                f"There are no images at {name!r}; give files, a folder with images "
                f"({', '.join(PICTURE_SUFFIXES)}) in it, or a pattern in quotes."
            )
        found.update((os.path.abspath(path), path) for path in paths)
    return sorted(found.values())


def output_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path one that no other has: its file name, or where two have the same, that and
    the folders in which they differ.

    Raises:
        ValueError: where one is called as the drawing of another will be: a.gif.jpg and a.gif.
    """
    names = {path: os.path.basename(path) for path in paths}
    if len(set(names.values())) < len(paths):
        root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        names = {path: os.path.relpath(path, root) for path in paths}
    names = {
        path: name if name.lower().endswith(PICTURE_SUFFIXES) else f"{name}.jpg"
        for path, name in names.items()
    }
    first: dict[str, str] = {}
    for path, name in names.items():
        if first.setdefault(name, path) != path:
            raise ValueError(
                f"The drawings of {first[name]!r} and {path!r} would both be called {name!r}; "
                "rename one of the two."
            )
    return names


def read_annotations(path: str) -> dict[str, Any]:
    """A COCO annotation file.

    Raises:
        FileNotFoundError, ValueError: if there is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"The annotation file {path!r} does not exist.")
    try:
        content = json.loads(Path(path).read_text())
        content["images"], content["categories"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path!r} is no COCO annotation file with images and categories."
        ) from error
    return content


def image_ids(paths: Sequence[str], annotations: dict[str, Any] | None) -> dict[str, int]:
    """Those of the annotations by the end of the path; without any 1, 2, ... in the order of paths.

    Raises:
        ValueError: for an image that the annotations do not name.
    """
    if annotations is None:
        return {path: number for number, path in enumerate(paths, start=1)}
    known = {image["file_name"]: image["id"] for image in annotations["images"]}
    ids = {}
    for path in paths:
        parts = Path(path).parts
        ends = ("/".join(parts[i:]) for i in range(len(parts)))
        end = next((end for end in ends if end in known), None)
        if end is None:
            raise ValueError(f"The image {path!r} is not among the images of --annotations.")
        ids[path] = known[end]
    return ids


def load_metadata(cfg: CfgNode, annotations: dict[str, Any] | None = None) -> Metadata:
    """The class names and category ids of annotations, or of what ``cfg`` tests or trains on.

    It has no ``thing_classes`` where these are not known, the dataset being elsewhere.
    """
    if annotations is not None:
        categories = sorted(annotations["categories"], key=lambda category: category["id"])
        return Metadata(
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id={c["id"]: i for i, c in enumerate(categories)},
        )
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name)
        if "thing_classes" not in metadata.as_dict() and name in DatasetCatalog.list():
            with contextlib.suppress(OSError):
                DatasetCatalog.get(name)  # which tells the classes by reading the annotations
        if "thing_classes" in metadata.as_dict():
            return metadata
    return Metadata()


def categories_of(metadata: Metadata) -> dict[int, dict[str, Any]]:
    """{number of a class in the model: {"id", "name"} in its dataset}; empty where not known."""
    names = metadata.get("thing_classes", [])
    ids = metadata.get("thing_dataset_id_to_contiguous_id", {i: i for i in range(len(names))})
    return {number: {"id": i, "name": names[number]} for i, number in ids.items()}


def class_label(metadata: Metadata, number: int, score: float) -> str:
    """Such as "person 93%", or "class 0 93%" where the name is not known."""
    names = metadata.get("thing_classes", [])
    name = names[number] if number < len(names) else f"class {number}"
    return f"{name} {score:.0%}"
