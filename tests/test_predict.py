"""``tools/predict.py``: draws, writes what pycocotools reads, and goes on after a broken image."""

import json
import shutil
import sys
from functools import partial

import numpy as np
import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det import add_sasa_config
from sasa_det.config import load_config
from sasa_det.evaluation import build_evaluator
from sasa_det.prediction import (
    categories_of,
    find_pictures,
    image_ids,
    load_metadata,
    load_model,
    output_names,
    split_overrides,
)

EXIF_ORIENTATION = 0x0112
TURNED_LEFT = 6  # as a camera held upright writes it


@pytest.fixture
def predict(call_tool):
    pytest.importorskip("cv2", reason="detectron2 draws with OpenCV, which is not installed")
    return partial(call_tool, "predict.py")


@pytest.fixture(scope="module")
def photos(digits, tmp_path_factory):
    """Two pictures, one of them broken, and one that is turned by its EXIF data."""
    folder = tmp_path_factory.mktemp("photos")
    shutil.copy(digits / "val" / "000001.jpg", folder / "b.jpg")
    (folder / "broken.jpg").write_bytes((folder / "b.jpg").read_bytes()[:700])
    (folder / "notes.txt").write_text("no picture")
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = TURNED_LEFT
    Image.open(folder / "b.jpg").crop((0, 0, 128, 96)).save(folder / "a.png", exif=exif)
    return folder


def test_it_draws_and_writes_all_but_the_broken_one(predict, untrained_demo, photos, tmp_path):
    code, printed = predict(photos, "--output", tmp_path / "out", *untrained_demo)
    broken = str(photos / "broken.jpg")
    assert code == f"error: 1 of the images could not be used: {broken}"
    assert f"The image {broken!r} cannot be used" in printed
    assert "3/3" in printed  # the progress
    out = tmp_path / "out"
    names = {"a.png", "b.jpg", "images.json", "results.json"}
    assert {path.name for path in out.iterdir()} == names
    assert Image.open(out / "a.png").size == (96, 128)  # upright
    dataset = COCO(str(out / "images.json"))
    assert [
        (x["id"], x["file_name"], x["width"], x["height"]) for x in dataset.loadImgs([1, 2])
    ] == [
        (1, "a.png", 96, 128),
        (2, "b.jpg", 128, 128),
    ]
    results = dataset.loadRes(str(out / "results.json"))
    assert set(results.getImgIds()) == {1, 2}
    assert {x["category_id"] for x in results.anns.values()} <= set(range(1, 11))
    assert dataset.loadCats([1, 10]) == [{"id": 1, "name": "0"}, {"id": 10, "name": "9"}]


def test_with_annotations_the_results_are_those_of_detectron2s_evaluation(
    predict, untrained_demo, digits, tmp_path
):
    annotations = digits / "val.json"
    own = {**json.loads(annotations.read_text())}
    for image in own["images"]:
        image["id"] += 1000  # which no numbering of ours would give
    for annotation in own["annotations"]:
        annotation["image_id"] += 1000
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(own))
    pattern = str(digits / "val" / "*.jpg")
    code, _ = predict(
        *(pattern, "--output", tmp_path / "out", "--annotations", annotations),
        *untrained_demo,
    )
    assert code is None
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    register_coco_instances("predicted", {}, str(annotations), str(digits / "val"))
    options = [*untrained_demo[2:], "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(untrained_demo[1], options)
    evaluator = build_evaluator(cfg, "predicted")
    inference_on_dataset(load_model(cfg), build_detection_test_loader(cfg, "predicted"), evaluator)
    path = tmp_path / "inference" / "coco_instances_results.json"
    wanted = json.loads(path.read_text())
    assert len(results) == len(wanted) > 100

    def flat(found):
        return [[x["image_id"], x["category_id"], x["score"], *x["bbox"]] for x in found]

    np.testing.assert_allclose(flat(results), flat(wanted), rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def mask_rcnn(tmp_path_factory):
    """detectron2's Mask R-CNN as its configs have it, small, with a backbone of convolutions."""
    folder = tmp_path_factory.mktemp("mask_rcnn")
    cfg = get_cfg()
    add_sasa_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = "FastRCNNConvFCHead", 1
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 1, 32
    cfg.MODEL.MASK_ON, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = True, "cpu", str(folder / "model.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST, cfg.TEST.DETECTIONS_PER_IMAGE = 0.0, 7
    cfg.INPUT.MIN_SIZE_TEST, cfg.DATASETS.TEST = 128, ("coco_2017_val",)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    DetectionCheckpointer(build_model(cfg), str(folder)).save("model")
    return ["--config", str(folder / "config.yaml")]


def test_masks_of_a_real_photograph_by_mask_rcnn_without_our_backbone(
    predict, mask_rcnn, coco_slice, tmp_path
):
    photo = coco_slice / "coco" / "val2017" / "000000208901.jpg"
    annotations = coco_slice / "coco" / "annotations" / "instances_val2017.json"
    code, _ = predict(
        *(photo, "--output", tmp_path, "--score-threshold", "0"),
        *("--annotations", annotations, *mask_rcnn),
    )
    assert code is None
    drawn, original = (np.asarray(Image.open(p)) for p in (tmp_path / photo.name, photo))
    assert drawn.shape == original.shape
    assert (drawn.astype(int) - original).any()
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 7
    assert all(x["image_id"] == 208901 and x["segmentation"]["size"] == [427, 640] for x in results)
    evaluation = COCOeval(COCO(str(annotations)), COCO(str(annotations)).loadRes(results), "segm")
    evaluation.params.imgIds = [208901]
    evaluation.evaluate()
    evaluation.accumulate()


def test_buffers_of_other_versions_of_detectron2_do_no_harm(mask_rcnn, tmp_path):
    cfg = load_config(mask_rcnn[1])
    content = torch.load(cfg.MODEL.WEIGHTS)
    for name in ("pixel_mean", "proposal_generator.anchor_generator.cell_anchors.0"):
        content["model"][name] = torch.zeros(3)
    content["model"]["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = torch.tensor(1)
    torch.save(content, tmp_path / "model.pth")
    load_model(load_config(mask_rcnn[1], ["MODEL.WEIGHTS", str(tmp_path / "model.pth")]))


def test_ids_and_names_of_the_classes():
    coco = load_metadata(load_config(str(CONFIGS / "retinanet_conv.yaml")))
    assert categories_of(coco)[79] == {"id": 90, "name": "toothbrush"}
    digits = load_metadata(load_config(str(CONFIGS / "demo.yaml")))
    assert categories_of(digits)[9] == {"id": 10, "name": "9"}
    elsewhere = ["DATASETS.TEST", "('of_nobody',)", "DATASETS.TRAIN", "()"]
    unknown = load_metadata(load_config(str(CONFIGS / "demo.yaml"), elsewhere))
    assert categories_of(unknown) == {}
    annotations = {"categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}]}
    given = load_metadata(load_config(str(CONFIGS / "demo.yaml")), annotations)
    assert categories_of(given) == {0: {"id": 3, "name": "a"}, 1: {"id": 7, "name": "b"}}


def test_classes_without_names_are_numbers(predict, untrained_demo, digits, tmp_path):
    elsewhere = ["DATASETS.TEST", "('of_nobody',)", "DATASETS.TRAIN", "()"]
    image = digits / "val" / "000001.jpg"
    code, printed = predict(image, "--output", tmp_path, *untrained_demo, *elsewhere)
    assert code is None
    assert "The names of the classes are not known: their numbers are drawn and written." in printed
    categories = json.loads((tmp_path / "images.json").read_text())["categories"]
    assert categories
    assert all(x["name"] == f"class {x['id']}" and x["id"] < 10 for x in categories)


def test_images_are_found_once_and_drawn_under_names_of_their_own(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "b/1.jpg", "b/2.gif", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    paths = find_pictures(["a", str(tmp_path / "a"), "b", "b/*.gif"])
    assert output_names(paths) == {
        str(tmp_path / "a" / "1.jpg"): "a/1.jpg",
        "b/1.jpg": "b/1.jpg",
        "b/2.gif": "b/2.gif.jpg",
    }
    assert output_names(["a/1.jpg", "b/2.JPG"]) == {"a/1.jpg": "1.jpg", "b/2.JPG": "2.JPG"}
    assert image_ids(paths, None) == {path: i for i, path in enumerate(paths, start=1)}
    annotations = {"images": [{"file_name": "b/1.jpg", "id": 5}, {"file_name": "1.jpg", "id": 6}]}
    assert image_ids(paths[:2], annotations) == {paths[0]: 6, paths[1]: 5}


def test_overrides_begin_where_a_section_of_the_config_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "TEST.JPG").touch()
    arguments = ["a.jpg", "TEST.JPG", "MODEL.WEIGHT", "x.pth", "SEED", "1"]
    assert split_overrides(arguments) == (arguments[:2], arguments[2:])
    assert split_overrides(["a.jpg"]) == (["a.jpg"], [])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{folder}/none"], "There are no images at "),
        (["{folder}/*.bmp"], "There are no images at "),
        (["{folder}", "--output", "{folder}"], "is one of the files that are read; choose another"),
        (["{twice}", "{twice}/sub", "--output", "{twice}/sub"], "sub/1.jpg' is one of the files "),
        (
            ["{folder}", "--annotations", "images.json", "--output", "."],
            "'images.json' is one of the files that are read",
        ),
        (["{same}/*"], "would both be called '1.gif.jpg'; rename one"),
        (["{folder}", "--output", "few"], "folder 'few' cannot be written: File exists; choose"),
        (["{folder}", "--output", "taken"], "'taken/results.json' is a folder; choose a name for"),
        (
            ["{folder}", "--annotations", "none.json"],
            "The annotation file 'none.json' does not",
        ),
        (["{folder}", "--annotations", "{folder}/000001.jpg"], "is no COCO annotation file with "),
        (["{folder}", "--annotations", "{other}"], "000001.jpg' is not among the images of --ann"),
        (
            ["{folder}", "--annotations", "{few}", "--score-threshold", "0"],
            "but the dataset has only 1 classes; set",
        ),
    ],
    ids=[
        *("folder", "pattern", "overwrite", "overwrite another", "overwrite annotations"),
        *("one name for two", "file as folder", "folder as file"),
        *("missing", "no JSON", "other images", "classes"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    predict, untrained_demo, digits, tmp_path, monkeypatch, arguments, sentence
):
    few = json.loads((digits / "val.json").read_text())
    few["categories"] = few["categories"][:1]
    other = {"images": [], "categories": few["categories"]}
    for name, content in (("few", few), ("other", other), ("images.json", few)):
        (tmp_path / name).write_text(json.dumps(content))
    for name in ("twice/1.jpg", "twice/sub/1.jpg", "same/1.gif", "same/1.gif.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(digits / "val" / "000001.jpg", tmp_path / name)
    (tmp_path / "taken" / "results.json").mkdir(parents=True)
    names = {"folder": digits / "val", **{name.name: name for name in tmp_path.iterdir()}}
    inputs = [*(digits / "val").iterdir(), *tmp_path.rglob("*.jpg"), tmp_path / "images.json"]
    before = {path: path.read_bytes() for path in inputs}
    monkeypatch.chdir(tmp_path)  # of the default output
    arguments = [argument.format(**names) for argument in arguments]
    code, printed = predict(*arguments, *untrained_demo)
    assert code.startswith("error: ")
    assert sentence in code
    assert "Traceback" not in printed
    assert {path: path.read_bytes() for path in inputs} == before


def test_without_opencv_it_says_what_to_install(call_tool, untrained_demo, digits, monkeypatch):
    monkeypatch.delitem(sys.modules, "detectron2.utils.visualizer", raising=False)
    monkeypatch.setitem(sys.modules, "cv2", None)
    code, _ = call_tool("predict.py", digits / "val", *untrained_demo)
    assert code.startswith("error: detectron2 draws with cv2, which is not installed; pip install")
