"""The built-in dataset: handwritten digits in clutter, generated on first use.

Real handwriting (scikit-learn's copy of the UCI digits, 8x8 pixels) is pasted at three sizes, in
pale colours, rotated, overlapping, on dark noisy ground with strokes as distractors. COCO format;
the writing of the training images and that of the validation images are different samples.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
NUM_IMAGES = {"train": 3000, "val": 200}
# Changes whenever the pictures do, so that an older copy on disk is made anew.
_VERSION = 1
_SEED = {"train": 2019, "val": 6909}
# Of 1797 samples of handwriting, the others are kept for validation.
_NUM_TRAIN_SAMPLES = 1400
# Heights in pixels: small, medium and large by COCO's areas, 32**2 and 96**2.
_HEIGHTS = {"small": (22, 31), "medium": (40, 72), "large": (108, 124)}
# How many of each size an image may have, the largest first.
_COUNTS = {"large": (0, 1), "medium": (1, 3), "small": (3, 6)}
_MIN_VISIBLE = 0.85


def register_digits() -> None:
    """Registers ``sasa_digits_train`` and ``sasa_digits_val`` with detectron2."""
    for split in NUM_IMAGES:
        name = f"sasa_digits_{split}"
        if name in DatasetCatalog.list():
            continue
        folder = digits_root()
        json_file, image_root = folder / f"{split}.json", folder / split
        DatasetCatalog.register(name, lambda s=split, n=name: _load(s, n))
        MetadataCatalog.get(name).set(
            json_file=str(json_file),
            image_root=str(image_root),
            evaluator_type="coco",
            generated=True,
        )


def digits_root() -> Path:
    """Where the dataset lives: ``sasa_digits`` below detectron2's folder for datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")) / "sasa_digits"


def generate_digits(folder: Path, split: str, num_images: int, seed: int) -> None:
    """Writes ``{split}.json`` and the folder ``{split}`` of images, the same for equal seeds."""
    glyphs, labels = _load_samples(split)
    rng = np.random.default_rng(seed)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (folder / split).mkdir(parents=True, exist_ok=True)
    for image_id in range(1, num_images + 1):
        picture, objects = _draw(rng, glyphs, labels)
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


def _load(split: str, name: str) -> list[dict]:
    folder = digits_root()
    json_file = folder / f"{split}.json"
    folder.mkdir(parents=True, exist_ok=True)
    # The processes of a training on several GPUs all come here at once.
    with file_lock(str(json_file)):
        if not _is_current(json_file):
            _generate_in_place(folder, split)
    return load_coco_json(str(json_file), str(folder / split), name)


def _is_current(json_file: Path) -> bool:
    return json_file.is_file() and json.loads(json_file.read_text())["info"]["version"] == _VERSION


def _generate_in_place(folder: Path, split: str) -> None:
    """Generates beside the final place, then moves: an interrupted run leaves nothing half done."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        generate_digits(Path(temporary), split, NUM_IMAGES[split], _SEED[split])
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
    rng: np.random.Generator, glyphs: np.ndarray, labels: np.ndarray
) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """A picture and its objects: (digit, (x, y, width, height))."""
    canvas = _background(rng)
    objects = []
    masks: list[np.ndarray] = []  # what is visible of each object
    sizes: list[float] = []
    for size, (least, most) in _COUNTS.items():
        for _ in range(rng.integers(least, most + 1)):
            sample = rng.integers(len(glyphs))
            mask, box = _place(rng, glyphs[sample], size)
            # Every object so far must stay visible enough under the new one.
            visible = [m * (1 - mask) for m in masks]
            if any(m.sum() < _MIN_VISIBLE * whole for m, whole in zip(visible, sizes)):
                continue
            masks, sizes = [*visible, mask], [*sizes, mask.sum()]
            colour = rng.uniform(200, 255, 3)
            canvas = canvas * (1 - mask[..., None]) + colour * mask[..., None]
            objects.append((int(labels[sample]), box))
    canvas += rng.normal(0, 6, canvas.shape)
    return Image.fromarray(canvas.clip(0, 255).astype(np.uint8)), objects


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
    rng: np.random.Generator, glyph: np.ndarray, size: str
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """Coverage of the canvas in [0, 1] by a glyph, resized, rotated, somewhere; and its box."""
    inked = np.argwhere(glyph > 0.1)
    (top, left), (bottom, right) = inked.min(axis=0), inked.max(axis=0) + 1
    height = int(rng.integers(*_HEIGHTS[size], endpoint=True))
    aspect = (right - left) / (bottom - top) * rng.uniform(0.9, 1.2)
    width = max(6, int(height * min(aspect, 1.0)))
    ink = Image.fromarray((glyph[top:bottom, left:right] * 255).astype(np.uint8))
    ink = ink.resize((width, height), Image.Resampling.BICUBIC)
    ink = ink.rotate(rng.uniform(-5, 5), Image.Resampling.BICUBIC, expand=True)
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
