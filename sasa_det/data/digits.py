"""The built-in datasets: handwritten digits in clutter, generated on first use.

Real handwriting (scikit-learn's copy of the UCI digits, 8x8 pixels) is pasted at three sizes, in
pale colours, rotated, overlapping, on dark noisy ground with strokes as distractors. COCO format;
the writing of the training images and that of the validation images are different samples.

``sasa_digits`` is for the demo; ``sasa_digits_hard``, with pieces of digits that are no objects,
more of each digit hidden, and more rotation, contrast and noise, is for comparing detectors.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
SPLITS = ("train", "val")
# Changes whenever the pictures do, so that an older copy on disk is made anew.
_VERSION = 1
_SEED = {"train": 2019, "val": 6909}
# Of 1797 samples of handwriting, the others are kept for validation.
_NUM_TRAIN_SAMPLES = 1400
# Heights in pixels: small, medium and large by COCO's areas, 32**2 and 96**2.
_HEIGHTS = {"small": (22, 31), "medium": (40, 72), "large": (108, 124)}
# How many of each size an image may have, the largest first.
_COUNTS = {"large": (0, 1), "medium": (1, 3), "small": (3, 6)}


class Variant(NamedTuple):
    """What makes one built-in dataset harder than another."""

    name: str
    num_images: dict[str, int]
    min_visible: float  # of each digit's strokes
    max_rotation: float  # degrees
    darkest_stroke: int  # of 255
    noise: float  # standard deviation, of 255
    num_pieces: tuple[int, int]  # fragments of digits, least and most an image


VARIANTS = (
    Variant("sasa_digits", {"train": 3000, "val": 200}, 0.85, 5, 200, 6, (0, 0)),
    Variant("sasa_digits_hard", {"train": 6000, "val": 500}, 0.7, 10, 150, 10, (2, 5)),
)


def register_digits() -> None:
    """Registers ``sasa_digits_train``, ``sasa_digits_val`` and ``sasa_digits_hard_...``."""
    for variant in VARIANTS:
        for split in SPLITS:
            _register(variant, split)


def _register(variant: Variant, split: str) -> None:
    name = f"{variant.name}_{split}"
    if name in DatasetCatalog.list():
        return
    folder = digits_root(variant)
    DatasetCatalog.register(name, lambda: _load(variant, split))
    MetadataCatalog.get(name).set(
        json_file=str(folder / f"{split}.json"),
        image_root=str(folder / split),
        evaluator_type="coco",
        generated=True,
        # What reading the annotations says too; known before there are any.
        thing_classes=list(map(str, range(10))),
        thing_dataset_id_to_contiguous_id={digit + 1: digit for digit in range(10)},
    )


def digits_root(variant: Variant) -> Path:
    """Where the dataset lives: a folder of its name below detectron2's folder for datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / variant.name


def generate_digits(
    folder: Path, split: str, num_images: int, seed: int, variant: Variant = VARIANTS[0]
) -> None:
    """Writes ``{split}.json`` and the folder ``{split}`` of images, the same for equal seeds."""
    glyphs, labels = _load_samples(split)
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for image_id in range(1, num_images + 1):
        picture, objects = _draw(rng, glyphs, labels, variant)
        file_name = f"{image_id:06d}.jpg"
        picture.save(folder / split / file_name, quality=95)
        images.append(
            {"id": image_id, "file_name": file_name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
        for label, (x, y, width, height) in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "sasa_det's digits in clutter", "version": _VERSION},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": digit + 1, "name": str(digit)} for digit in range(10)],
    }
    # Last, so that the file's presence says that the split is complete.
    (folder / f"{split}.json").write_text(json.dumps(content))


def _load(variant: Variant, split: str) -> list[dict]:
    folder = digits_root(variant)
    json_file = folder / f"{split}.json"
    folder.mkdir(parents=True, exist_ok=True)
    # The processes of a training on several GPUs all come here at once.
    with file_lock(str(json_file)):
        if not _is_current(json_file, folder / split):
            _generate_in_place(variant, split)
    return load_coco_json(str(json_file), str(folder / split), f"{variant.name}_{split}")


def _is_current(json_file: Path, pictures: Path) -> bool:
    if not json_file.is_file():
        return False
    content = json.loads(json_file.read_text())
    return content["info"]["version"] == _VERSION and all(
        (pictures / image["file_name"]).is_file() for image in content["images"]
    )


def _generate_in_place(variant: Variant, split: str) -> None:
    """Generates beside the final place, then moves: an interrupted run leaves nothing half done."""
    folder = digits_root(variant)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        images = variant.num_images[split]
        generate_digits(Path(temporary), split, images, _SEED[split], variant)
        if (folder / split).exists():
            (folder / split).rename(Path(temporary) / "old")
        (Path(temporary) / split).rename(folder / split)
        (Path(temporary) / f"{split}.json").replace(folder / f"{split}.json")


def _load_samples(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(samples, 8, 8) in [0, 1] and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "The built-in dataset is made from scikit-learn's digits; "
            "install it with: pip install scikit-learn"
        ) from error
    digits = load_digits()
    part = slice(None, _NUM_TRAIN_SAMPLES) if split == "train" else slice(_NUM_TRAIN_SAMPLES, None)
    return digits.images[part] / 16.0, digits.target[part]


def _draw(
    rng: np.random.Generator, glyphs: np.ndarray, labels: np.ndarray, variant: Variant
) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """A picture and its objects: (digit, (x, y, width, height))."""
    canvas = _background(rng)
    for _ in range(rng.integers(*variant.num_pieces, endpoint=True)):
        piece, _ = _place(rng, _cut(rng, glyphs[rng.integers(len(glyphs))]), "small", variant)
        canvas = _paint(rng, canvas, piece, variant)
    objects = []
    masks: list[np.ndarray] = []  # what is visible of each object
    sizes: list[float] = []
    for size, (least, most) in _COUNTS.items():
        for _ in range(rng.integers(least, most + 1)):
            sample = rng.integers(len(glyphs))
            mask, box = _place(rng, glyphs[sample], size, variant)
            # Every object so far must stay visible enough under the new one.
            visible = [m * (1 - mask) for m in masks]
            least_visible = variant.min_visible
            if any(m.sum() < least_visible * whole for m, whole in zip(visible, sizes)):
                continue
            masks, sizes = [*visible, mask], [*sizes, mask.sum()]
            canvas = _paint(rng, canvas, mask, variant)
            objects.append((int(labels[sample]), box))
    canvas += rng.normal(0, variant.noise, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), objects


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, variant: Variant
) -> np.ndarray:
    colour = rng.uniform(variant.darkest_stroke, 255, 3)
    return canvas * (1 - mask[..., None]) + colour * mask[..., None]


def _cut(rng: np.random.Generator, glyph: np.ndarray) -> np.ndarray:
    """The upper, lower, left or right half of a glyph: strokes like a digit's, but no digit."""
    half = np.rot90(glyph, int(rng.integers(4)))[:4]
    return half if half.max() > 0.5 else glyph[:4]


def _background(rng: np.random.Generator) -> np.ndarray:
    """Soft dark patches of colour with strokes over them."""
    patches = Image.fromarray(rng.integers(0, 80, (4, 4, 3), dtype=np.uint8))
    picture = patches.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 6)):
        points = [tuple(p) for p in rng.integers(0, IMAGE_SIZE, (rng.integers(2, 4), 2)).tolist()]
        colour = tuple(rng.integers(60, 130, 3).tolist())
        draw.line(points, fill=colour, width=int(rng.integers(1, 4)))
    return np.asarray(picture, dtype=np.float64)


def _place(
    rng: np.random.Generator, glyph: np.ndarray, size: str, variant: Variant
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Coverage of the canvas in [0, 1] by a glyph, resized, rotated, somewhere; and its box."""
    inked = np.argwhere(glyph > 0.1)
    (top, left), (bottom, right) = inked.min(axis=0), inked.max(axis=0) + 1
    height = int(rng.integers(*_HEIGHTS[size], endpoint=True))
    aspect = (right - left) / (bottom - top) * rng.uniform(0.9, 1.2)
    width = max(6, int(height * min(aspect, 1.0)))
    ink = Image.fromarray((glyph[top:bottom, left:right] * 255).astype(np.uint8))
    ink = ink.resize((width, height), Image.Resampling.BICUBIC)
    angle = rng.uniform(-variant.max_rotation, variant.max_rotation)
    ink = ink.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    # A steep edge: pen strokes, not the blur of the small original.
    coverage = (np.asarray(ink) / 255.0 - 0.45).clip(0, 0.2) / 0.2
    inked = np.argwhere(coverage > 0.5)
    (top, left), (bottom, right) = inked.min(axis=0), inked.max(axis=0) + 1
    coverage = coverage[top:bottom, left:right][:IMAGE_SIZE, :IMAGE_SIZE]
    height, width = coverage.shape
    x = int(rng.integers(0, IMAGE_SIZE - width, endpoint=True))
    y = int(rng.integers(0, IMAGE_SIZE - height, endpoint=True))
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    mask[y : y + height, x : x + width] = coverage
    return mask, (x, y, width, height)
