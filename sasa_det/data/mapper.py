"""From a record of a dataset to what a model is given; the augmentation for training."""

from typing import Any

import detectron2.data.transforms as T
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper


class RecordMapper(DatasetMapper):
    """detectron2's mapper, whose errors name the image.

    Raises:
        ValueError: for whatever is wrong with the image's file or its record.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        try:
            return super().__call__(dataset_dict)
        except Exception as error:  # Pillow alone has half a dozen classes for a broken file
            record = (
                f" (image_id {dataset_dict['image_id']!r})" if "image_id" in dataset_dict else ""
            )
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(
                f"The image {dataset_dict['file_name']!r}{record} cannot be used: {reason}"
            ) from error


def build_test_mapper(cfg: CfgNode) -> DatasetMapper:
    return RecordMapper(cfg, is_train=False)


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper; with ``INPUT.IMAGE_SIZE`` set, its resizing is large-scale jitter.

    The image is fitted into the square, scaled by a factor from [MIN_SCALE, MAX_SCALE], then cut at
    a random place or padded at the bottom right to ``IMAGE_SIZE`` pixels each way.
    """
    if not cfg.INPUT.IMAGE_SIZE:
        return RecordMapper(cfg, is_train=True)
    size = cfg.INPUT.IMAGE_SIZE
    augmentations = [
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size),
        T.FixedSizeCrop((size, size)),
    ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    return RecordMapper(cfg, is_train=True, augmentations=augmentations)
