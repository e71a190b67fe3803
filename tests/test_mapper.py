"""The augmentation: masks, boxes and stuff stay on what they annotate, in every format."""

import numpy as np
import pycocotools.mask as mask_util
import pytest

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from test_models import small

from sasa_det.config import load_config
from sasa_det.data import build_train_mapper
from sasa_det.data.mapper import IGNORED_STUFF

HEIGHT, WIDTH, SQUARE = 120, 160, 96
CORNERS = [20, 30, 150, 10, 90, 110]  # a triangle, to be painted white


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A white triangle on black, and the semantic segmentation that says so."""
    folder = tmp_path_factory.mktemp("mapper")
    (rle,) = mask_util.frPyObjects([CORNERS], HEIGHT, WIDTH)
    mask = mask_util.decode(rle)
    Image.fromarray(np.repeat(255 * mask[:, :, None], 3, axis=2)).save(folder / "image.png")
    Image.fromarray(mask).save(folder / "stuff.png")
    return folder, rle


@pytest.mark.parametrize(
    ("annotated", "mask_format"),
    [("polygon", "bitmask"), ("polygon", "polygon"), ("rle", "bitmask")],
)
def test_masks_and_boxes_follow_what_they_annotate(picture, annotated, mask_format):
    folder, rle = picture
    overrides = ["INPUT.IMAGE_SIZE", str(SQUARE), "INPUT.MASK_FORMAT", mask_format]
    mapper = build_train_mapper(load_config(str(CONFIGS / "mask_rcnn_attn.yaml"), overrides))
    sample = {
        "file_name": str(folder / "image.png"),
        "sem_seg_file_name": str(folder / "stuff.png"),
        "height": HEIGHT,
        "width": WIDTH,
        "annotations": [
            {
                "bbox": [20, 10, 150, 110],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": [CORNERS] if annotated == "polygon" else rle,
            }
        ],
    }
    np.random.seed(0)
    cut = padded = 0
    for _ in range(30):
        result = mapper(sample)
        white, stuff = result["image"][0] > 150, result["sem_seg"]
        assert white.shape == stuff.shape == (SQUARE, SQUARE)
        pad = stuff == IGNORED_STUFF
        assert ((result["image"] == 128).all(dim=0) == pad).float().mean() > 0.99
        assert overlap(white, stuff == 1) > 0.9
        (mask,) = drawn(result["instances"].gt_masks)
        assert not (mask & pad).any()
        assert overlap(white, mask) > 0.9
        (box,) = result["instances"].gt_boxes.tensor
        if mask_format == "bitmask":
            rows, columns = mask.nonzero().unbind(dim=1)
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.tolist() == [float(x) for x in tight]
        assert (box >= 0).all()
        assert (box <= SQUARE).all()
        padded += bool(pad.any())
        cut += not pad.any()
    assert min(cut, padded) > 5


@pytest.mark.parametrize("number_of_crowds", [0, 1])
def test_a_mask_rcnn_trains_on_an_image_without_objects(picture, number_of_crowds):
    folder, rle = picture
    cfg = small("mask_rcnn_attn", "MODEL.SASA.NUM_HEADS", "4", "INPUT.IMAGE_SIZE", str(SQUARE))
    record = {"file_name": str(folder / "image.png"), "height": HEIGHT, "width": WIDTH}
    thing = {"bbox": [20, 10, 150, 110], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    crowd, thing = ({**thing, "segmentation": rle, "iscrowd": number} for number in (1, 0))
    mapper = build_train_mapper(cfg)
    np.random.seed(0)
    empty = mapper({**record, "annotations": [crowd] * number_of_crowds})
    assert len(empty["instances"]) == 0
    batch = [empty, mapper({**record, "annotations": [crowd, thing]})]
    with EventStorage():
        losses = build_model(cfg)(batch)
    assert losses["loss_mask"] > 0
    assert all(loss.isfinite() for loss in losses.values())


def drawn(masks):
    if isinstance(masks, BitMasks):
        return masks.tensor
    return BitMasks.from_polygon_masks(masks, SQUARE, SQUARE).tensor


def overlap(one, other):
    return float((one & other).sum() / (one | other).sum().clamp(min=1))
