"""Unlabelled images: which there are, and how a model sees them."""

from collections.abc import Iterable
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.samplers import TrainingSampler

from sasa_det.data import build_test_mapper, build_train_mapper, check_datasets

_SUFFIXES = (".jpg", ".jpeg", ".png")
_MAX_HELD_OUT = 32


def find_images(where: str) -> list[str]:
    """Paths of images: of a folder and those below it, of a text file with one path a line, or of
    a dataset registered with detectron2.

    Raises:
        FileNotFoundError, ValueError: if there are none, or fewer than two.
    """
    path = Path(where)
    if path.is_dir():
        found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
    elif path.is_file():
        found = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        for line in found:
            if not Path(line).is_file():
                raise FileNotFoundError(f"The image {line!r}, listed in {where!r}, does not exist.")
    elif where in DatasetCatalog.list():
        check_datasets([where])
        found = [record["file_name"] for record in DatasetCatalog.get(where)]
    else:
        raise FileNotFoundError(
            f"{where!r} is no folder of images, no list of them and no registered dataset."
        )
    if len(found) < 2:
        raise ValueError(
            f"{where!r} has {len(found)} images ({', '.join(_SUFFIXES)}), but one to fit and one "
            "to measure with are needed at least."
        )
    return found


def image_loaders(
    cfg: CfgNode, images: list[str], batch_size: int
) -> tuple[Iterable[list[dict]], Iterable[list[dict]]]:
    """Endless batches as in training, of nine images in ten; and single images of the rest, at
    most 32, as in testing."""
    records = [{"file_name": name} for name in images]
    step = max(10, -(-len(records) // _MAX_HELD_OUT))
    held_out = records[::step]
    rest = [record for index, record in enumerate(records) if index % step]
    training = build_detection_train_loader(
        rest,
        mapper=build_train_mapper(cfg),
        sampler=TrainingSampler(len(rest), seed=max(cfg.SEED, 0)),
        total_batch_size=batch_size,
        aspect_ratio_grouping=False,  # it would need the sizes of the images
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    testing = build_detection_test_loader(held_out, mapper=build_test_mapper(cfg))
    return training, testing
