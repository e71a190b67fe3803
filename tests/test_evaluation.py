"""The figures are right for boxes, masks, keypoints and stuff, and where nothing is detected."""

import importlib.util
import json

import numpy as np
import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image

from sasa_det.config import load_config
from sasa_det.evaluation import build_evaluator, write_results

SIDE = 64
BOX = [8.0, 8.0, 40.0, 48.0]  # x0, y0, x1, y1
CORNERS = [8.0, 8.0, 40.0, 8.0, 40.0, 48.0]  # a triangle that fills half of the box
POINTS = [[10.0, 10.0, 2], [30.0, 12.0, 2], [38.0, 40.0, 2]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """One image with one object, which has a mask and keypoints, before stuff of two kinds."""
    folder = tmp_path_factory.mktemp("dataset")
    stuff = np.zeros((SIDE, SIDE), dtype=np.uint8)
    stuff[:, 20:] = 1
    stuff[:5] = 255
    Image.fromarray(stuff).save(folder / "stuff.png")
    x0, y0, x1, y1 = BOX
    content = {
        "info": {},
        "images": [{"id": 1, "file_name": "image.png", "height": SIDE, "width": SIDE}],
        "categories": [
            {"id": 1, "name": "thing", "keypoints": ["a", "b", "c"], "skeleton": []},
        ],
        "annotations": [
            {
                **{"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "num_keypoints": 3},
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0) / 2,
                "segmentation": [CORNERS],
                "keypoints": [x for point in POINTS for x in point],
            }
        ],
    }
    (folder / "annotations.json").write_text(json.dumps(content))
    register_coco_instances("a_thing", {}, str(folder / "annotations.json"), str(folder))
    DatasetCatalog.get("a_thing")  # as a data loader does: the metadata are then known
    sample = {"file_name": "image.png", "sem_seg_file_name": str(folder / "stuff.png")}
    for kind in ("coco_panoptic_seg", "sem_seg"):
        DatasetCatalog.register(f"a_{kind}", lambda: [{**sample, "image_id": 1}])
        MetadataCatalog.get(f"a_{kind}").set(
            evaluator_type=kind,
            json_file=str(folder / "annotations.json"),
            thing_classes=["thing"],
            thing_dataset_id_to_contiguous_id={1: 0},
            stuff_classes=["one", "another"],
            stuff_dataset_id_to_contiguous_id={1: 0, 2: 1},
            ignore_label=255,
        )
    yield torch.as_tensor(stuff.astype("int64"))
    for name in ("a_thing", "a_coco_panoptic_seg", "a_sem_seg"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def a_config(folder, *overrides):
    sigmas = ["TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1, 0.1]", "OUTPUT_DIR", str(folder)]
    return load_config(str(CONFIGS / "mask_rcnn_attn.yaml"), [*sigmas, *overrides])


def evaluate(cfg, name, output):
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    inputs = {"image_id": 1, "file_name": "image.png", "height": SIDE, "width": SIDE}
    evaluator.process([inputs], [output])
    return evaluator.evaluate()


def the_object(found=True):
    instances = Instances((SIDE, SIDE))
    instances.pred_boxes = Boxes(torch.tensor([BOX]))
    instances.pred_classes = torch.tensor([0])
    instances.scores = torch.tensor([0.9])
    masks = PolygonMasks([[np.array(CORNERS)]])
    instances.pred_masks = BitMasks.from_polygon_masks(masks, SIDE, SIDE).tensor
    # Where detectron2 counts from the pixels' corners, COCO counts from their centres.
    instances.pred_keypoints = torch.tensor([POINTS]) + torch.tensor([0.5, 0.5, 0])
    return instances if found else instances[:0]


@pytest.mark.parametrize(("found", "expected"), [(True, 100), (False, 0)])
def test_each_task_has_its_ap(dataset, tmp_path, found, expected):
    cfg = a_config(tmp_path, "MODEL.KEYPOINT_ON", "True")
    results = evaluate(cfg, "a_thing", {"instances": the_object(found)})
    assert set(results) == {"bbox", "segm", "keypoints"}
    for task, figures in results.items():
        assert [figures["AP"], figures["AP50"]] == pytest.approx([expected] * 2), task
    # There is no large object: COCO has no figure for it.
    write_results({"a_thing": results}, tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())["a_thing"]
    assert written["segm"]["APl"] is None
    assert written["segm"]["AP"] == pytest.approx(expected)


def test_a_box_detector_that_finds_nothing_has_no_figures_for_masks(dataset, tmp_path):
    cfg = a_config(tmp_path, "MODEL.MASK_ON", "False")
    results = evaluate(cfg, "a_thing", {"instances": the_object(found=False)})
    assert set(results) == {"bbox"}


@pytest.mark.parametrize(
    ("name", "tasks"),
    [("a_sem_seg", {"sem_seg"}), ("a_coco_panoptic_seg", {"sem_seg", "bbox", "segm"})],
)
def test_stuff_is_evaluated_where_the_dataset_has_it(dataset, tmp_path, caplog, name, tasks):
    if name == "a_coco_panoptic_seg" and importlib.util.find_spec("panopticapi"):
        pytest.skip("with panopticapi this needs COCO's panoptic annotations")
    logits = torch.nn.functional.one_hot(dataset.clamp(max=1), 2).permute(2, 0, 1).float()
    instances = the_object()
    instances.remove("pred_keypoints")
    output = {"instances": instances, "sem_seg": logits}
    results = evaluate(a_config(tmp_path), name, output)
    assert set(results) == tasks
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert ("pip install git+https://github.com/cocodataset" in caplog.text) == ("bbox" in tasks)
