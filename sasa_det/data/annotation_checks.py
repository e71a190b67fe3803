"""What an annotation file tells of itself: one function a fault, each yielding its findings."""

import os
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from .annotation_file import AnnotationFile, shortened
from .box_checks import BOX_CHECKS
from .findings import (
    ERROR,
    NEVER_FOUND,
    NOTE,
    STOPS,
    WARNING,
    Effect,
    Finding,
    Kind,
    Use,
    printable,
)

_DOES_NOT_START = Effect(ERROR, "stops before the first image")

MISSING_IMAGE = Kind("missing image file", STOPS, STOPS)
OUTSIDE_FOLDER = Kind(
    "image outside of its folder",
    Effect(WARNING, "reads it wherever it is"),
    Effect(WARNING, "reads it wherever it is"),
)
SHARED_FILE = Kind(
    "image file of several records",
    Effect(WARNING, "takes the objects of each record for background in the others"),
    Effect(WARNING, "counts what it finds of the other records' objects as wrong"),
)
DUPLICATE_IMAGE = Kind(
    "image id used twice",
    Effect(ERROR, "reads the last of them, with the boxes of all"),
    Effect(ERROR, "reads the last of them, with the boxes of all"),
)
NO_OBJECT = Kind(
    "image without annotations",
    Effect(NOTE, "leaves it out, if DATALOADER.FILTER_EMPTY_ANNOTATIONS is true"),
    None,
)
CROWD_ONLY = Kind("image with crowds only", NO_OBJECT.training, None)
NOTHING_TO_LEARN = Kind(
    "dataset without a single object", _DOES_NOT_START, Effect(WARNING, "has no AP to give")
)
DUPLICATE_ANNOTATION = Kind("annotation id used twice", _DOES_NOT_START, _DOES_NOT_START)
ZERO_ID = Kind("annotation with the id 0", None, Effect(WARNING, NEVER_FOUND))
UNKNOWN_IMAGE = Kind(
    "annotation of no image", Effect(WARNING, "leaves it out"), Effect(WARNING, "leaves it out")
)
UNKNOWN_CATEGORY = Kind("annotation of no category", _DOES_NOT_START, _DOES_NOT_START)
MARKED_IGNORE = Kind("annotation marked to be ignored", _DOES_NOT_START, _DOES_NOT_START)
CROWD_FLAG = Kind(
    "iscrowd neither 0 nor 1",
    Effect(ERROR, "takes the object for a crowd and leaves it out"),
    Effect(ERROR, "stops after the last image, or leaves the object out"),
)
NOT_COUNTABLE = Kind(
    "annotation without area or iscrowd",
    None,
    Effect(ERROR, "stops after the last image, before any AP"),
)
WRONG_CLASSES = Kind(
    "number of classes unlike the model's",
    Effect(ERROR, "takes classes beyond the model's for background, or stops"),
    Effect(ERROR, "stops after the last image, or has classes that are never found"),
)
OTHER_CLASSES = Kind("categories unlike the registered ones", _DOES_NOT_START, _DOES_NOT_START)


def check_annotations(data: AnnotationFile, use: Use) -> list[Finding]:
    """Everything that can be known without opening an image."""
    found = [finding for check in (*_CHECKS, *BOX_CHECKS) for finding in check(data, use)]
    return [finding for finding in (*data.findings, *found) if use.effect(finding.kind)]


def missing_images(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    """Each folder is listed once: over a network that is far less than asking for each file."""
    listings: dict[str, set[str]] = {}
    for image in data.images:
        path = data.image_path(image)
        folder, name = os.path.split(path)
        if folder not in listings:
            listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listings[folder] and not os.path.exists(path):
            message = f"has no file: {path!r} does not exist"
            yield data.image_finding(MISSING_IMAGE, image, message)


def images_outside_the_folder(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    if not data.image_root:  # the file names are whole paths, as intended
        return
    inside = os.path.join(os.path.abspath(data.image_root), "")
    for image in data.images:
        name = image["file_name"]
        if name.startswith("/") or ".." in name or os.path.isabs(name):
            path = os.path.abspath(data.image_path(image))
            if not path.startswith(inside):
                message = f"lies outside of the image folder, at {path!r}"
                yield data.image_finding(OUTSIDE_FOLDER, image, message)


def files_of_several_images(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    seen: dict[str, dict] = {}
    for image in data.images:
        first = seen.setdefault(os.path.normpath(image["file_name"]), image)
        if first["id"] != image["id"]:
            message = f"has the same file as image {first['id']!r}"
            yield data.image_finding(SHARED_FILE, image, message)


def duplicate_image_ids(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    seen: dict[object, dict] = {}
    for image in data.images:
        first = seen.setdefault(image["id"], image)
        if first is not image:
            message = f"has the id of {first['file_name']!r} too"
            yield data.image_finding(DUPLICATE_IMAGE, image, message)


def duplicate_annotation_ids(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    ids = [annotation["id"] for annotation in data.annotations]
    if len(set(ids)) == len(ids):
        return
    seen: dict[object, int] = {}
    for index, annotation_id in enumerate(ids):
        first = seen.setdefault(annotation_id, index)
        if first != index:
            image = data.annotations[first]["image_id"]
            message = f"has the id of another annotation, of image {image!r}"
            yield data.annotation_finding(DUPLICATE_ANNOTATION, index, message)


def zero_ids(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    """pycocotools marks detections by the annotation's id, and those without a match by 0."""
    for index, annotation in enumerate(data.annotations):
        if annotation["id"] == 0:
            message = "has an id that pycocotools takes for 'no match'"
            yield data.annotation_finding(ZERO_ID, index, message)


def annotations_of_no_image(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index in np.flatnonzero(data.image_of < 0).tolist():
        message = "belongs to an image that is not in the file"
        yield data.annotation_finding(UNKNOWN_IMAGE, index, message)


def annotations_of_no_category(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index, annotation in enumerate(data.annotations):
        if annotation["category_id"] not in data.categories:
            message = f"has the category_id {annotation['category_id']!r}, which is no category"
            yield data.annotation_finding(UNKNOWN_CATEGORY, index, message)


def annotations_to_be_ignored(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index, annotation in enumerate(data.annotations):
        if annotation.get("ignore", 0) != 0:
            message = f"has ignore {annotation['ignore']!r}, which detectron2 does not know"
            yield data.annotation_finding(MARKED_IGNORE, index, message)


def unknown_crowd_flags(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index, annotation in enumerate(data.annotations):
        if annotation.get("iscrowd", 0) not in (0, 1):
            message = f"has iscrowd {annotation['iscrowd']!r}, which is neither 0 nor 1"
            yield data.annotation_finding(CROWD_FLAG, index, message)


def annotations_without_area(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index, annotation in enumerate(data.annotations):
        if not isinstance(annotation.get("area"), int | float):
            area = f"the area {annotation['area']!r}" if "area" in annotation else "no 'area'"
            yield data.annotation_finding(NOT_COUNTABLE, index, f"has {area}")
        elif "iscrowd" not in annotation:
            yield data.annotation_finding(NOT_COUNTABLE, index, "has no 'iscrowd'")


def images_without_objects(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    is_object = np.array([a.get("iscrowd", 0) == 0 for a in data.annotations], dtype=bool)
    counted = data.image_of >= 0
    annotations = np.bincount(data.image_of[counted], minlength=len(data.images))
    objects = np.bincount(data.image_of[counted & is_object], minlength=len(data.images))
    if not objects.any():
        message = f"has no annotation of an object among {len(data.annotations)}"
        yield Finding(NOTHING_TO_LEARN, data.path, "the dataset", message)
        return
    for index in np.flatnonzero(objects == 0).tolist():
        kind = CROWD_ONLY if annotations[index] else NO_OBJECT
        message = "has crowds only" if annotations[index] else "has no annotations"
        yield data.image_finding(kind, data.images[index], message)


def unlike_number_of_classes(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    number = len(data.categories)
    if use.num_classes is not None and number != use.num_classes:
        message = (
            f"has {number} categories, but {use.num_classes_key} is {use.num_classes}; set it to "
            f"{number}"
        )
        yield Finding(WRONG_CLASSES, data.path, "the dataset", message)


def unlike_registered_classes(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    names = tuple(data.categories[number] for number in sorted(data.categories))
    if use.registered_classes and names != use.registered_classes:
        message = (
            f"has the categories {shortened(names)}, but is registered with "
            f"{shortened(use.registered_classes)}"
        )
        yield Finding(OTHER_CLASSES, data.path, "the dataset", message)


_CHECKS: tuple[Callable[[AnnotationFile, Use], Iterator[Finding]], ...] = (
    unlike_number_of_classes,
    unlike_registered_classes,
    missing_images,
    images_outside_the_folder,
    duplicate_image_ids,
    files_of_several_images,
    duplicate_annotation_ids,
    zero_ids,
    annotations_of_no_image,
    annotations_of_no_category,
    annotations_to_be_ignored,
    unknown_crowd_flags,
    annotations_without_area,
    images_without_objects,
)


def describe(data: AnnotationFile) -> str:
    """Counts of images, boxes by COCO's sizes, and categories, with those that have no box."""
    of_boxes = data.boxes[:, 2] * data.boxes[:, 3]
    areas = np.array([_area(a, of_box) for a, of_box in zip(data.annotations, of_boxes)])
    crowds = np.array([bool(a.get("iscrowd", 0)) for a in data.annotations], dtype=bool)
    small, medium = (areas < 32**2) & ~crowds, (areas >= 32**2) & (areas < 96**2) & ~crowds
    large = len(areas) - crowds.sum() - small.sum() - medium.sum()
    used = Counter(annotation["category_id"] for annotation in data.annotations)
    unused = [
        printable(str(name)) for number, name in data.categories.items() if number not in used
    ]
    lines = [
        f"{data.path}: {len(data.images):,} images, {len(areas):,} boxes "
        f"({small.sum():,} small, {medium.sum():,} medium, {large:,} large, {crowds.sum():,} "
        f"crowds), {len(data.categories):,} categories."
    ]
    if unused:
        rest = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
        lines.append(f"Categories without a box: {', '.join(unused[:10])}{rest}.")
    return "\n".join(lines)


def _area(annotation: dict, of_box: float) -> float:
    """COCO's sizes are by the area of the object, not of its box."""
    area = annotation.get("area")
    return area if isinstance(area, int | float) else of_box
