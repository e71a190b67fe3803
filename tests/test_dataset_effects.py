"""What becomes of faulty datasets: detectron2 does what the report says, and training stops."""

# ruff: noqa: F811  (two fixtures are imported)

import json
import re
import shlex
import shutil

import pytest

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS, ROOT
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_dataset_checks import NAN, content, digits, first  # noqa: F401
from test_training import train_net

from sasa_det.config import load_config
from sasa_det.data import (
    annotation_checks,
    annotation_file,
    box_checks,
    build_train_mapper,
    check_config_datasets,
    image_checks,
)
from sasa_det.data.findings import Kind


def learnt(content, folder, *options):
    """The boxes that training gets of the first image."""
    (folder / "learnt.json").write_text(json.dumps(content))
    record = load_coco_json(str(folder / "learnt.json"), str(folder / "train"), "learnt_digits")[0]
    cfg = load_config(str(CONFIGS / "demo.yaml"), ["INPUT.MIN_SIZE_TRAIN", "(128,)", *options])
    return build_train_mapper(cfg)(record)["instances"].gt_boxes.tensor.tolist()


@pytest.mark.parametrize(
    ("box", "becomes"),
    [
        ([50, 60, -30, -40], [20, 20, 50, 60]),
        ([10, 20, 0, 40], None),
        ([10, NAN, 30, 40], None),
        ([10, 20, float("inf"), 40], [10, 20, 128, 60]),
        ([130, 20, 30, 40], None),
        ([100, 20, 300, 40], [100, 20, 128, 60]),
    ],
    ids=str,
)
def test_training_does_with_a_faulty_box_what_the_report_says(box, becomes, content, digits):
    """It learns a mirror image, leaves out, stretches or cuts, and never says so."""
    content["annotations"] = content["annotations"][:1]
    first(bbox=box)(content)
    assert learnt(content, digits) == ([becomes] if becomes else [])


def test_training_with_padding_learns_a_box_outside_of_its_image(content, digits):
    content["annotations"] = content["annotations"][:1]
    first(bbox=[130, 20, 30, 40])(content)
    half = ["INPUT.MIN_SCALE", "0.5", "INPUT.MAX_SCALE", "0.5", "INPUT.IMAGE_SIZE", "128"]
    assert learnt(content, digits, *half) == [[65, 10, 80, 30]]  # of a picture of 64x64


def average_precision(content, folder):
    """Of perfect detections, the content's own boxes."""
    path = folder / "evaluated.json"
    path.write_text(json.dumps(content))
    truth = COCO(str(path))
    keys = ("image_id", "category_id", "bbox")
    detections = [{key: a[key] for key in keys} for a in content["annotations"]]
    evaluation = COCOeval(truth, truth.loadRes([{**d, "score": 1} for d in detections]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation.stats[0]


def test_evaluation_never_finds_id_0_and_stops_without_area(content, tmp_path):
    assert average_precision(content, tmp_path) == pytest.approx(1)
    first(id=0)(content)
    assert average_precision(content, tmp_path) < 0.98
    first(area=None)(content)
    with pytest.raises(KeyError, match="area"):
        average_precision(content, tmp_path)


@pytest.fixture
def built_in(digits, tmp_path):
    """Where a process with DETECTRON2_DATASETS there finds sasa_digits_train; without val."""
    folder = tmp_path / "sasa_digits"
    shutil.copytree(digits / "train", folder / "train")
    return folder


DEMO = ["--config", "configs/demo.yaml", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 1]


def test_training_does_not_start_on_a_faulty_file(content, built_in, tmp_path):
    for annotation in content["annotations"][:2]:
        annotation["bbox"][2] *= -1
    path = built_in / "train.json"
    path.write_text(json.dumps(content))
    run = train_net(*DEMO, "OUTPUT_DIR", tmp_path / "out", datasets=tmp_path, check=False)
    sentence = run.stderr.splitlines()[-1]
    assert run.returncode == 1
    assert sentence.startswith(f"error: {path}: annotation 1 of image 1 ('000001.jpg') has the box")
    assert "whose size is negative (1 more like it), and training learns its mirror" in sentence
    images = built_in / "train"
    assert f"tools/check_dataset.py --annotations {path} --images {images} " in sentence
    assert not (tmp_path / "out").exists()


def test_training_warns_and_names_the_image_that_it_cannot_read(content, built_in, tmp_path):
    """What the file tells is in the log; a truncated image is known when it is read."""
    first(bbox=[10, 20, 0, 40])(content)
    (built_in / "train.json").write_text(json.dumps(content))
    for image in (built_in / "train").iterdir():
        image.write_bytes(image.read_bytes()[:-100])
    run = train_net(*DEMO, "OUTPUT_DIR", tmp_path / "out", datasets=tmp_path, check=False)
    assert run.returncode
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "which has no area, and training leaves the box out" in log
    last = run.stderr.strip().splitlines()[-1]
    assert re.search(
        r"The image '.*digits/train/00000[123].jpg' \(image_id [123]\) cannot be", last
    )
    assert "truncated" in last.lower()


def test_a_file_is_checked_anew_when_it_changed(content, digits, tmp_path):
    path = tmp_path / "changing.json"
    register_coco_instances("changing", {}, str(path), str(digits / "train"))
    overrides = ["DATASETS.TRAIN", "('changing',)", "DATASETS.TEST", "()"]
    cfg = load_config(str(CONFIGS / "demo.yaml"), overrides)
    path.write_text(json.dumps(content))
    assert check_config_datasets(cfg, training=True) == []
    first(bbox=[10, 20, 0, 40])(content)
    path.write_text(json.dumps(content))
    (warning,) = check_config_datasets(cfg, training=True)
    assert "annotation 1 of image 1" in warning
    assert check_config_datasets(cfg, training=False) == []


def with_whole_paths(content):
    first(bbox=[50, 60, -30, 40])(content)
    for image in content["images"]:
        image["file_name"] = f"/nowhere/{image['file_name']}"


@pytest.mark.parametrize(
    ("config", "key", "number", "folder", "change", "fault"),
    [
        ("demo", "RETINANET", 20, "{}", first(), "number of classes unlike the model's"),
        ("mask_rcnn_attn", "ROI_HEADS", 10, "{}", first(), "segmentation that gives no mask"),
        ("demo", "RETINANET", 10, "", with_whole_paths, "box of negative size"),
    ],
    ids=["classes", "masks", "no folder"],
)
def test_the_command_of_a_sentence_lists_the_fault(
    config, key, number, folder, change, fault, content, digits, tmp_path, call_tool, monkeypatch
):
    change(content)
    name, path = f"faulty by {fault}", tmp_path / "faulty.json"
    path.write_text(json.dumps(content))
    register_coco_instances(name, {}, str(path), folder.format(digits / "train"))
    overrides = ["DATASETS.TRAIN", f"({name!r},)", "DATASETS.TEST", "()"]
    overrides += [f"MODEL.{key}.NUM_CLASSES", str(number)]
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), overrides)
    with pytest.raises(ValueError, match="list all with: python tools/") as error:
        check_config_datasets(cfg, training=True)
    monkeypatch.chdir(ROOT)
    tool, *words = shlex.split(str(error.value).rpartition("python tools/")[2])
    code, printed = call_tool(tool, *words)
    assert code == 1
    assert f"error: {fault}, " in printed


def test_what_is_not_cocos_is_left_to_who_registered_it(tmp_path):
    MetadataCatalog.get("panoptic").set(
        json_file=str(tmp_path), image_root=str(tmp_path), evaluator_type="coco_panoptic_seg"
    )
    DatasetCatalog.register("panoptic", list)
    overrides = ["DATASETS.TRAIN", "('panoptic',)", "DATASETS.TEST", "()"]
    cfg = load_config(str(CONFIGS / "demo.yaml"), overrides)
    assert check_config_datasets(cfg, training=True) == []


def test_the_documentation_lists_each_fault_with_what_becomes_of_it():
    modules = (annotation_file, annotation_checks, box_checks, image_checks)
    kinds = [k for module in modules for k in vars(module).values() if isinstance(k, Kind)]
    lines = (ROOT / "docs" / "dataset.md").read_text().splitlines()
    assert len(kinds) > 30
    for kind in kinds:
        training, evaluation = (
            f"{effect.severity}: {effect.text}" if effect else "fine"
            for effect in (kind.training, kind.evaluation)
        )
        assert f"| {kind.name} | {training} | {evaluation} |" in lines
