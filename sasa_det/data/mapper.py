"""From a record of a dataset to what a model is given; the augmentation for training."""

import copy
from typing import Any

import detectron2.data.transforms as T
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.utils.file_io import PathManager
from fvcore.transforms.transform import CropTransform, PadTransform, TransformList
from PIL import Image

from .image_checks import depth_fault
from .workers import UnusableImageError

IGNORED_STUFF = 255  # what detectron2's semantic segmentation learns nothing from


class RecordMapper(DatasetMapper):
    """detectron2's mapper, whose errors name the image.

    Raises:
        UnusableImageError: for whatever is wrong with the image's file or its record; and for greys
            that detectron2 would cut to white or black.
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mapper = copy.copy(self)
        try:
            with PathManager.open(dataset_dict["file_name"], "rb") as file:
                fault = depth_fault(Image.open(file))
            if fault:
                raise ValueError(f"it {fault[1]}; scale them to 8 bits")
            objects = [x for x in dataset_dict.get("annotations", ()) if not x.get("iscrowd", 0)]
            # Where there are none, detectron2 has no masks to take their boxes from, and stops.
            mapper.recompute_boxes = self.recompute_boxes and bool(objects)
            return DatasetMapper.__call__(mapper, dataset_dict)
        except Exception as error:
            record = (
                f" (image_id {dataset_dict['image_id']!r})" if "image_id" in dataset_dict else ""
            )
            raise UnusableImageError.because_of(error, dataset_dict["file_name"], record) from error


def build_test_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper for evaluation, whose errors name the image."""
    return RecordMapper(cfg, is_train=False)


def build_train_mapper(cfg: CfgNode) -> DatasetMapper:
    """detectron2's mapper; with ``INPUT.IMAGE_SIZE`` set, its resizing is large-scale jitter.

    The image is fitted into the square, scaled by a factor from [MIN_SCALE, MAX_SCALE], then cut at
    a random place or padded at the bottom right to ``IMAGE_SIZE`` pixels each way. Where masks are
    bitmaps, the boxes of cut objects are those of the masks.
    """
    if not cfg.INPUT.IMAGE_SIZE:
        return RecordMapper(cfg, is_train=True)
    size = cfg.INPUT.IMAGE_SIZE
    augmentations = [
        T.ResizeScale(cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE, size, size),
        SquareCut((size, size)),
    ]
    if cfg.INPUT.RANDOM_FLIP != "none":
        augmentations.append(
            T.RandomFlip(
                horizontal=cfg.INPUT.RANDOM_FLIP == "horizontal",
                vertical=cfg.INPUT.RANDOM_FLIP == "vertical",
            )
        )
    return RecordMapper(
        cfg,
        is_train=True,
        augmentations=augmentations,
        # The polygons are not cut, see below: their boxes would reach out of the image.
        recompute_boxes=cfg.MODEL.MASK_ON and cfg.INPUT.MASK_FORMAT == "bitmask",
    )


class SquareCut(T.FixedSizeCrop):
    """FixedSizeCrop with masks right in all their formats, without shapely.

    Padding belongs to no mask; in semantic segmentation it is ignored.
    """

    def __call__(self, aug_input: T.AugInput) -> TransformList:
        transforms = super().__call__(aug_input)
        # The semantic segmentation has been padded; bitmaps of objects will be.
        transforms.transforms[1].seg_pad_value = 0
        return transforms

    def get_transform(self, image: np.ndarray) -> TransformList:
        cut, pad = super().get_transform(image).transforms
        size = (pad.x0, pad.y0, pad.x1, pad.y1, pad.orig_w, pad.orig_h)
        return TransformList(
            [
                _Cut(cut.x0, cut.y0, cut.w, cut.h, cut.orig_w, cut.orig_h),
                PadTransform(*size, pad_value=self.pad_value, seg_pad_value=IGNORED_STUFF),
            ]
        )


class _Cut(CropTransform):
    """Leaves polygons whole: what is outside the image is cut off when they are drawn."""

    def apply_polygons(self, polygons: list) -> list:
        return [self.apply_coords(polygon) for polygon in polygons]
