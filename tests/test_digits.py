"""The built-in dataset: real handwriting in COCO format, the same for equal seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sasa_det  # noqa: F401

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from sasa_det.data import check_datasets, digits
from sasa_det.data.digits import IMAGE_SIZE, generate_digits


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    generate_digits(folder, "train", num_images=150, seed=1)
    return folder, json.loads((folder / "train.json").read_text())


def test_equal_seeds_give_equal_pictures_and_boxes(generated, tmp_path):
    folder, _ = generated
    generate_digits(tmp_path, "train", num_images=3, seed=1)
    for number in (1, 2, 3):
        name = f"train/{number:06d}.jpg"
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    generate_digits(tmp_path, "train", num_images=1, seed=2)
    assert (tmp_path / "train/000001.jpg").read_bytes() != (
        folder / "train/000001.jpg"
    ).read_bytes()


def test_objects_of_all_three_sizes_lie_inside_their_images(generated):
    _, content = generated
    areas = np.array([annotation["area"] for annotation in content["annotations"]])
    assert ((areas < 32**2).sum(), (areas >= 96**2).sum()) > (50, 5)
    assert ((areas >= 32**2) & (areas < 96**2)).sum() > 50
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= IMAGE_SIZE
        assert y + height <= IMAGE_SIZE
    assert {image["id"] for image in content["images"]} == set(range(1, 151))


def test_some_objects_overlap(generated):
    _, content = generated
    boxes = {}
    for annotation in content["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    overlapping = [
        (a, b)
        for of_image in boxes.values()
        for a in of_image
        for b in of_image
        if a is not b and a[0] < b[0] + b[2] and b[0] < a[0] + a[2]
        if a[1] < b[1] + b[3] and b[1] < a[1] + a[3]
    ]
    assert len(overlapping) > 20


def test_boxes_hold_digits_brighter_than_the_background(generated):
    folder, content = generated
    file_names = {image["id"]: image["file_name"] for image in content["images"]}
    brighter = []
    for annotation in content["annotations"]:
        path = folder / "train" / file_names[annotation["image_id"]]
        picture = np.asarray(Image.open(path).convert("L"), dtype=float)
        x, y, width, height = annotation["bbox"]
        inside = picture[y : y + height, x : x + width]
        brighter.append(np.percentile(inside, 90) > picture.mean())
    assert np.mean(brighter) > 0.95


def test_training_and_validation_share_no_handwriting():
    train, val = (digits._load_samples(split)[0] for split in ("train", "val"))
    assert len(train) == 1400
    assert len(val) == 397
    known = {sample.tobytes() for sample in train}
    assert not any(sample.tobytes() in known for sample in val)


def test_the_hard_variant_hides_more_and_adds_pieces_that_are_no_objects(tmp_path):
    plain, hard = digits.VARIANTS
    assert hard.min_visible < plain.min_visible
    for variant in digits.VARIANTS:
        generate_digits(tmp_path / variant.name, "val", num_images=40, seed=3, variant=variant)
    contents = [
        json.loads((tmp_path / variant.name / "val.json").read_text())
        for variant in digits.VARIANTS
    ]
    # More of the ground is bright, although the boxes cover hardly more of it.
    unlabelled = [
        np.mean([bright_outside_boxes(tmp_path / v.name / "val", c, i) for i in range(1, 41)])
        for v, c in zip(digits.VARIANTS, contents)
    ]
    assert unlabelled[1] > 3 * unlabelled[0]


def bright_outside_boxes(folder, content, image_id):
    picture = np.array(Image.open(folder / f"{image_id:06d}.jpg").convert("L"))
    for annotation in content["annotations"]:
        if annotation["image_id"] == image_id:
            x, y, width, height = annotation["bbox"]
            picture[y : y + height, x : x + width] = 0
    return (picture > 150).mean()


def test_it_is_generated_on_first_use_and_when_a_picture_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setitem(digits.VARIANTS[0].num_images, "val", 5)
    check_datasets(["sasa_digits_val"])
    samples = DatasetCatalog.get("sasa_digits_val")
    assert len(samples) == 5
    assert all(Path(sample["file_name"]).is_file() for sample in samples)
    written = (tmp_path / "sasa_digits" / "val.json").stat().st_mtime_ns
    assert len(DatasetCatalog.get("sasa_digits_val")) == 5
    assert (tmp_path / "sasa_digits" / "val.json").stat().st_mtime_ns == written
    Path(samples[2]["file_name"]).unlink()
    assert len(DatasetCatalog.get("sasa_digits_val")) == 5
    assert Path(samples[2]["file_name"]).is_file()


def test_a_missing_dataset_is_named_with_the_remedy():
    with pytest.raises(ValueError, match=r"registered as 'coco_2071'; register it"):
        check_datasets(["coco_2071"])
    MetadataCatalog.get("moved_away").set(json_file="/nowhere/a.json", image_root="/nowhere")
    DatasetCatalog.register("moved_away", list)
    with pytest.raises(FileNotFoundError, match=r"needs /nowhere/a.json.*DETECTRON2_DATASETS"):
        check_datasets(["moved_away"])
