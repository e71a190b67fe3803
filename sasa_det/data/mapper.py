"""The augmentation for training: random scale, a square cut, a flip."""

import detectron2.data.transforms as T
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper; with ``INPUT.IMAGE_SIZE`` set, its resizing is large-scale jitter.

    The image is fitted into the square, scaled by a factor from [MIN_SCALE, MAX_SCALE], then cut at
    a random place or padded at the bottom right to ``IMAGE_SIZE`` pixels each way.
    """
    if not cfg.INPUT.IMAGE_SIZE:
        return DatasetMapper(cfg, is_train=True)
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
    return DatasetMapper(cfg, is_train=True, augmentations=augmentations)
