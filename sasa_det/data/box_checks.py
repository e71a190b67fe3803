"""Faults of boxes, and of the outlines and masks that go with them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .annotation_file import AnnotationFile, shortened
from .findings import ERROR, NEVER_FOUND, WARNING, Effect, Finding, Kind, Use

# Annotators and rounding leave boxes that reach a little over the border.
_TOLERANCE = 1.0  # pixels

NOT_FINITE = Kind(
    "box that is not finite",
    Effect(ERROR, "leaves the box out, or stretches it to the border"),
    Effect(ERROR, NEVER_FOUND),
)
NEGATIVE = Kind(
    "box of negative size",
    Effect(ERROR, "learns its mirror image"),
    Effect(ERROR, NEVER_FOUND),
)
NO_AREA = Kind(
    "box without area",
    Effect(WARNING, "leaves the box out"),
    Effect(WARNING, NEVER_FOUND),
)
OUTSIDE = Kind(
    "box outside of its image",
    Effect(ERROR, "leaves the box out, or with INPUT.IMAGE_SIZE learns it in the padding"),
    Effect(WARNING, NEVER_FOUND),
)
PARTLY_OUTSIDE = Kind(
    "box over the border of its image",
    Effect(WARNING, "cuts it, or with INPUT.IMAGE_SIZE lets it reach into the padding"),
    Effect(WARNING, "compares with the whole box"),
)
MALFORMED_SEGMENTATION = Kind(
    "malformed segmentation",
    Effect(ERROR, "stops before the first image, or leaves the box out as well"),
    Effect(ERROR, "stops before the first image"),
)
NO_POLYGON = Kind(
    "segmentation without a polygon",
    Effect(WARNING, "leaves the box out as well, even of a model without masks"),
    None,
)
UNUSABLE_MASK = Kind(
    "segmentation that gives no mask",
    Effect(ERROR, "stops when it comes to it, or learns a wrong mask"),
    None,
)


def faulty_boxes(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    """Each box is said to have one fault, the first of these."""
    x, y, width, height = data.boxes.T
    image_width, image_height = (
        np.where(data.image_of >= 0, data.sizes[data.image_of, axis], np.inf) for axis in (0, 1)
    )
    with np.errstate(invalid="ignore"):
        is_inside = (x < image_width) & (y < image_height) & (x + width > 0) & (y + height > 0)
        reaches_over = np.maximum.reduce(
            [-x, -y, x + width - image_width, y + height - image_height]
        )
    faults = (
        (NOT_FINITE, ~np.isfinite(data.boxes).all(axis=1), "which is not finite"),
        (NEGATIVE, (width < 0) | (height < 0), "whose size is negative"),
        (NO_AREA, (width == 0) | (height == 0), "which has no area"),
        (OUTSIDE, ~is_inside, "which lies outside of the {} pixels of the image"),
        (PARTLY_OUTSIDE, reaches_over > _TOLERANCE, "which goes beyond the {} pixels of the image"),
    )
    known = np.zeros(len(data.boxes), dtype=bool)
    for kind, has_it, words in faults:
        for index in np.flatnonzero(has_it & ~known).tolist():
            image = data.sizes[data.image_of[index]] if data.image_of[index] >= 0 else (0, 0)
            described = words.format("{:.0f}x{:.0f}".format(*image))
            box = data.annotations[index]["bbox"]
            yield data.annotation_finding(kind, index, f"has the box {box}, {described}")
        known |= has_it


def faulty_segmentations(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    for index, annotation in enumerate(data.annotations):
        segmentation = annotation.get("segmentation")
        if not segmentation:
            continue
        fault = _segmentation_fault(segmentation)
        if fault:
            message = f"has the segmentation {shortened(segmentation)}, {fault}"
            yield data.annotation_finding(MALFORMED_SEGMENTATION, index, message)
        elif isinstance(segmentation, list) and not any(map(_is_polygon, segmentation)):
            message = "has a segmentation in which no polygon has three points"
            yield data.annotation_finding(NO_POLYGON, index, message)


def unusable_masks(data: AnnotationFile, use: Use) -> Iterator[Finding]:
    if use.mask_format is None:
        return
    for index, annotation in enumerate(data.annotations):
        image = data.image_of[index]
        if image < 0 or annotation.get("iscrowd", 0) != 0:  # neither is learnt
            continue
        segmentation = annotation.get("segmentation")
        if segmentation and _segmentation_fault(segmentation):
            continue
        fault = _mask_fault(segmentation, data.sizes[image], use.mask_format)
        if fault:
            yield data.annotation_finding(UNUSABLE_MASK, index, fault)


BOX_CHECKS: tuple[Callable[[AnnotationFile, Use], Iterator[Finding]], ...] = (
    faulty_boxes,
    faulty_segmentations,
    unusable_masks,
)


def _is_polygon(points: list) -> bool:
    return len(points) >= 6 and len(points) % 2 == 0


def _segmentation_fault(segmentation: Any) -> str | None:
    """What makes detectron2 fail when it loads the file, with masks or without."""
    if isinstance(segmentation, list):
        if all(isinstance(polygon, list) for polygon in segmentation):
            return None
        return "which is not a list of polygons, each a list of x, y, x, y, ..."
    if not isinstance(segmentation, dict):
        return "which is neither polygons nor COCO's run lengths"
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int for n in size):
        return "whose 'size' is not [height, width]"
    if isinstance(counts, list):
        lengths_fit = all(type(n) is int and n >= 0 for n in counts) and sum(counts) == math.prod(
            size
        )
        return None if lengths_fit else "whose 'counts' do not add up to the pixels of its 'size'"
    return None if isinstance(counts, str) else "whose 'counts' are no run lengths"


def _mask_fault(segmentation: Any, size: np.ndarray, mask_format: str) -> str | None:
    if not segmentation:
        return "has no segmentation, which MODEL.MASK_ON needs"
    if isinstance(segmentation, dict):
        if mask_format == "polygon":
            return "has run lengths for a segmentation, which need INPUT.MASK_FORMAT bitmask"
        if list(segmentation["size"]) != [size[1], size[0]]:
            return f"has a mask of {segmentation['size']} (height, width), unlike its image"
        return None
    for polygon in filter(_is_polygon, segmentation):
        # Not a number makes the rasteriser ask for memory without end.
        if not all(type(n) in (int, float) and math.isfinite(n) for n in polygon):
            return "has a segmentation with a coordinate that is no finite number"
    return None
