"""COCO annotation files: read, and parted into records that can be used and such that cannot."""

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .findings import ERROR, Effect, Finding, Kind

_STOPS = Effect(ERROR, "stops before the first image, or when it comes to it")
INCOMPLETE_IMAGE = Kind("incomplete image record", _STOPS, _STOPS)
INCOMPLETE_ANNOTATION = Kind(
    "incomplete annotation", _STOPS, Effect(ERROR, "stops, or counts the object as never found")
)
DUPLICATE_CATEGORY = Kind(
    "category id used twice",
    Effect(ERROR, "numbers the classes with gaps"),
    Effect(ERROR, "stops after the last image"),
)


class AnnotationFile:
    """The records of a COCO annotation file that have what detectron2 looks for, by columns.

    Attributes:
        path, image_root (str): as they were given.
        categories (dict): names by id.
        images, annotations (list[dict]): the complete records.
        sizes (np.ndarray): (images, 2), width and height in pixels.
        boxes (np.ndarray): float64 (annotations, 4): x, y, width, height in pixels.
        image_of (np.ndarray): (annotations,) indices into ``images``, -1 for an unknown image.
        findings (list[Finding]): one for each record left out.
    """

    def __init__(self, path: str, image_root: str) -> None:
        """Reads the file.

        Raises:
            FileNotFoundError, ValueError: if it is none, or has no image or no category, with one
                sentence for the user.
        """
        self.path, self.image_root = str(path), str(image_root)
        content = _read(self.path)
        self.findings: list[Finding] = []
        self.categories: dict[Any, str] = {}
        for category in content["categories"]:
            self._add_category(category)
        self.images = self._complete(content["images"], "image", _image_fault, INCOMPLETE_IMAGE)
        self.annotations = self._complete(
            content.get("annotations", []), "annotation", _annotation_fault, INCOMPLETE_ANNOTATION
        )
        for records, what in ((self.images, "images"), (self.annotations, "annotations")):
            _require_one_type([record["id"] for record in records], what, self.path)
        _require_one_type(list(self.categories), "categories", self.path)
        self.sizes = self._columns([(i["width"], i["height"]) for i in self.images], 2)
        self.boxes = self._columns([a["bbox"] for a in self.annotations], 4)
        index = {image["id"]: i for i, image in enumerate(self.images)}
        self.image_of = np.array(
            [index.get(annotation["image_id"], -1) for annotation in self.annotations], dtype=int
        )

    def image_path(self, image: dict) -> str:
        return os.path.join(self.image_root, image["file_name"])

    def image_finding(self, kind: Kind, image: dict, message: str) -> Finding:
        return Finding(kind, self.path, f"image {image['id']!r} ({image['file_name']!r})", message)

    def annotation_finding(self, kind: Kind, index: int, message: str) -> Finding:
        annotation, image = self.annotations[index], self.image_of[index]
        where = f"annotation {annotation['id']!r} of image {annotation['image_id']!r}"
        if image >= 0:
            where += f" ({self.images[image]['file_name']!r})"
        return Finding(kind, self.path, where, message)

    def _add_category(self, category: Any) -> None:
        has_both = isinstance(category, dict) and {"id", "name"} <= category.keys()
        if not has_both or not isinstance(category["id"], int | str):
            raise ValueError(
                f"{self.path}: the category {shortened(category)} is not COCO's, which has an id "
                "and a name."
            )
        if category["id"] in self.categories:
            record = f"category {category['id']!r} ({category['name']!r})"
            message = f"has the id of {self.categories[category['id']]!r} too"
            self.findings.append(Finding(DUPLICATE_CATEGORY, self.path, record, message))
        else:
            self.categories[category["id"]] = category["name"]

    def _columns(self, rows: list, width: int) -> np.ndarray:
        try:
            return np.array(rows, dtype=np.float64).reshape(-1, width)
        except OverflowError:
            raise ValueError(f"{self.path}: a size or box is beyond all numbers.") from None

    def _complete(
        self, records: list, what: str, fault: Callable[[Any], str | None], kind: Kind
    ) -> list[dict]:
        complete = []
        for number, record in enumerate(records):
            message = fault(record)
            if message is None:
                complete.append(record)
                continue
            identity = record.get("id") if isinstance(record, dict) else None
            name = f"{what} number {number + 1}" if identity is None else f"{what} {identity!r}"
            self.findings.append(Finding(kind, self.path, name, message))
        return complete


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    """Halves the time that millions of small new objects take."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"The annotation file {path!r} does not exist.")
    try:
        with garbage_collection_off(), open(path, encoding="utf-8") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        cut_off = error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated")
        fault = "ends in the middle: it is truncated" if cut_off else "is not JSON"
        raise ValueError(
            f"The annotation file {path!r} {fault} ({error.msg}, line {error.lineno}, column "
            f"{error.colno})."
        ) from None
    except (ValueError, RecursionError) as error:  # no text, or numbers of thousands of digits
        raise ValueError(f"The annotation file {path!r} is not JSON ({error}).") from None
    other = _structure_fault(content)
    if other:
        raise ValueError(f"The annotation file {path!r} {other}.")
    return content


def _structure_fault(content: Any) -> str | None:
    if not isinstance(content, dict):
        return f"is not COCO's: it holds {shortened(content)}, not an object with lists"
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list):
            return f"is not COCO's: it has no list of {key!r}"
        if not content[key]:
            return f"has no {key}: the dataset is empty"
    if not isinstance(content.get("annotations", []), list):
        return "is not COCO's: its 'annotations' are no list"
    return None


def _image_fault(image: Any) -> str | None:
    missing = _missing(image, ("id", "file_name", "width", "height"))
    if missing:
        return missing
    if not isinstance(image["id"], int | str):
        return f"has the id {shortened(image['id'])}, which is no number"
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        return f"has the file_name {shortened(image['file_name'])}, which is no name"
    for key in ("width", "height"):
        if not isinstance(image[key], int | float) or not image[key] > 0 or image[key] % 1:
            return f"has the {key} {shortened(image[key])}, which is no number of pixels"
    return None


_NUMBERS = {int, float}


def _annotation_fault(annotation: Any) -> str | None:
    missing = _missing(annotation, ("id", "image_id", "category_id", "bbox"))
    if missing:
        return missing
    for key in ("id", "image_id", "category_id"):
        if not isinstance(annotation[key], int | str):
            return f"has the {key} {shortened(annotation[key])}, which is no number"
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not set(map(type, box)) <= _NUMBERS:
        return f"has the bbox {shortened(box)}, which is not four numbers: x, y, width, height"
    return None


def _missing(record: Any, keys: tuple[str, ...]) -> str | None:
    if not isinstance(record, dict):
        return f"is {shortened(record)}, not an object with {', '.join(keys)}"
    for key in keys:
        if key not in record:
            return f"has no {key!r}"
    return None


def _require_one_type(ids: list, what: str, path: str) -> None:
    """detectron2 sorts them."""
    if len({isinstance(i, str) for i in ids}) > 1:
        text, number = (next(i for i in ids if isinstance(i, of)) for of in (str, int))
        raise ValueError(
            f"{path}: the ids of {what} are numbers and strings, for instance {number!r} and "
            f"{text!r}; make them all numbers."
        )


def shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
