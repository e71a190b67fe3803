"""What only the image files tell: each is read as training reads it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from detectron2.data.detection_utils import read_image
from PIL import Image
from PIL.ExifTags import Base

from .annotation_file import AnnotationFile
from .findings import ERROR, STOPS, WARNING, Effect, Finding, Kind, Use

_WRONG_PIXELS = Effect(ERROR, "takes the wrong pixels without a word")

UNREADABLE = Kind("unreadable image", STOPS, STOPS)
DAMAGED = Kind("damaged image", _WRONG_PIXELS, _WRONG_PIXELS)
WRONG_SIZE = Kind("image size unlike its record", STOPS, STOPS)
BEYOND_8_BITS = Kind("image of more than 8 bits", STOPS, STOPS)
_HIDDEN = Effect(WARNING, "shows the colours that are hidden under transparent pixels")
TRANSPARENT = Kind("transparent image", _HIDDEN, _HIDDEN)
_TURNS = Effect(WARNING, "turns the picture, so boxes drawn on the file as it is are elsewhere")
TURNED = Kind("image turned by its EXIF orientation", _TURNS, _TURNS)

_CHUNK = 64  # images a task: few enough for a steady progress, and for little memory
_SWAPS_SIDES = (5, 6, 7, 8)


def check_images(data: AnnotationFile, use: Use, threads: int) -> Iterator[list[Finding]]:
    """Reads every image that is there; yields the findings of each, in no order but the file's."""
    with ThreadPoolExecutor(threads) as pool:
        images = iter(data.images)
        while chunk := list(islice(images, _CHUNK * threads)):
            yield from pool.map(lambda image: check_image(data, image, use), chunk)


def check_image(data: AnnotationFile, image: dict, use: Use) -> list[Finding]:
    """What is wrong with the file of an image record; a missing file is no finding here."""
    path, recorded = data.image_path(image), (image["width"], image["height"])
    if not os.path.exists(path):
        return []
    try:
        height, width = read_image(path, use.image_format).shape[:2]
        with Image.open(path) as opened:
            faults = [
                _size_fault(opened, (width, height), recorded),
                _orientation_fault(opened, (width, height), recorded),
                depth_fault(opened),
                _transparency_fault(opened),
            ]
        faults.append(_checksum_fault(path))
    except Exception as error:  # Pillow has no common class for what it raises on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        faults = [(UNREADABLE, f"cannot be read ({reason})")]
    record = f"image {image['id']!r} of {data.path}"
    return [
        Finding(kind, path, record, message)
        for kind, message in (fault for fault in faults if fault)
        if use.effect(kind)
    ]


_Fault = tuple[Kind, str] | None
_Size = tuple[int, int]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(Base.Orientation, 1)
    except Exception:  # detectron2 does without, too
        return 1


def _size_fault(image: Image.Image, size: _Size, recorded: _Size) -> _Fault:
    if size == recorded:
        return None
    sizes = "has {}x{} pixels, but its record says {:.0f}x{:.0f}".format(*size, *recorded)
    turned = _orientation(image) in _SWAPS_SIDES and size == recorded[::-1]
    reason = "; its EXIF orientation turns it when it is read" if turned else ""
    return WRONG_SIZE, sizes + reason


def _orientation_fault(image: Image.Image, size: _Size, recorded: _Size) -> _Fault:
    """Only where the record's size cannot tell for which of the two the boxes were drawn."""
    orientation = _orientation(image)
    if size != recorded or orientation not in range(2, 9):
        return None
    if orientation in _SWAPS_SIDES and size[0] != size[1]:
        return None
    return TURNED, f"has the EXIF orientation {orientation}, which its size does not show"


def depth_fault(image: Image.Image) -> _Fault:
    """Pillow cuts greys at 0 and 255 where they have more than 8 bits or are fractions."""
    if not image.mode.startswith(("I", "F")):
        return None
    pixels = np.asarray(image)
    least, most = pixels.min(), pixels.max()
    if least >= 0 and most <= 255 and not (image.mode == "F" and most <= 1):
        return None
    return BEYOND_8_BITS, (
        f"has grey values from {least} to {most} (mode {image.mode}), which are read as whole "
        "numbers cut off at 0 and 255"
    )


def _transparency_fault(image: Image.Image) -> _Fault:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return None
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    if alpha.min() == 255:
        return None
    return TRANSPARENT, f"is transparent in {(alpha < 255).mean():.0%} of its pixels"


def _checksum_fault(path: str) -> _Fault:
    """detectron2 swallows what Pillow says of a broken PNG, and goes on with what was read by then.

    It does so where it asks for the EXIF orientation, which a PNG may have behind its pixels.
    """
    with Image.open(path) as image:
        try:
            image.verify()
        except Exception as error:
            return DAMAGED, f"can be read, but is damaged ({error})"
    return None
