"""What is wrong with an annotation file is named with file and record, before a run starts."""

import copy
import json
import re

import pytest

import sasa_det  # noqa: F401

# isort: split

from sasa_det.data.annotation_checks import check_annotations
from sasa_det.data.annotation_file import AnnotationFile
from sasa_det.data.digits import generate_digits
from sasa_det.data.findings import Use

TRAINING, EVALUATION = Use(training=True), Use(training=False)
MASKS = Use(mask_format="polygon")
NAN = float("nan")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three pictures with their annotations."""
    folder = tmp_path_factory.mktemp("digits")
    generate_digits(folder, "train", num_images=3, seed=1)
    return folder


@pytest.fixture
def content(digits):
    return json.loads((digits / "train.json").read_text())


@pytest.fixture
def checked(digits, tmp_path):
    """The findings of changed content, by kind and sentence."""

    def check(content, use):
        path = tmp_path / "train.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        findings = check_annotations(AnnotationFile(path, digits / "train"), use)
        return [(finding.kind.name, str(finding)) for finding in findings]

    return check


def first(**changes):
    """Changes of the first annotation, which is of image 1; ``None`` takes the key away."""

    def change(content):
        annotation = content["annotations"][0]
        annotation.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del annotation[key]

    return change


def first_image(**changes):
    return lambda content: content["images"][0].update(changes)


def only_crowds(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(annotation["image_id"] == 2)


def no_annotations(content):
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]


def twice(key):
    return lambda content: content[key].append(copy.deepcopy(content[key][0]))


FAULTS = {
    # id: (change, use, kind, sentence after the path of the annotation file)
    "missing image": (
        first_image(file_name="gone.jpg"),
        *(TRAINING, "missing image file", r"image 1 \('gone.jpg'\) has no file: '.*gone.jpg' does"),
    ),
    "escape": (
        first_image(file_name="../train.json"),
        *(TRAINING, "image outside of its folder", r"image 1 \('../train.json'\) lies outside of"),
    ),
    "absolute": (
        first_image(file_name="/etc/passwd"),
        *(TRAINING, "image outside of its folder", r"folder, at '/etc/passwd'"),
    ),
    "shared file": (
        first_image(file_name="000002.jpg"),
        *(TRAINING, "image file of several records", r"image 2 .* has the same file as image 1"),
    ),
    "duplicate image": (
        first_image(id=2),
        *(TRAINING, "image id used twice", r"image 2 \('000002.jpg'\) has the id of '000001.jpg'"),
    ),
    "image without width": (
        lambda content: content["images"][0].pop("width"),
        *(TRAINING, "incomplete image record", r"image 1 has no 'width'"),
    ),
    "image width": (
        first_image(width="128"),
        *(TRAINING, "incomplete image record", r"image 1 has the width '128', which is no number"),
    ),
    "image is no record": (
        lambda content: content["images"].insert(0, "000001.jpg"),
        *(TRAINING, "incomplete image record", r"image number 1 is '000001.jpg', not an object"),
    ),
    "file name": (
        first_image(file_name=7),
        *(TRAINING, "incomplete image record", r"image 1 has the file_name 7, which is no name"),
    ),
    "zero area": (
        first(bbox=[10, 20, 0, 40]),
        *(TRAINING, "box without area"),
        r"annotation 1 of image 1 \('000001.jpg'\) has the box \[10, 20, 0, 40\], which has no",
    ),
    "negative": (
        first(bbox=[50, 60, -30, 40]),
        *(TRAINING, "box of negative size", r"annotation 1 .* \[50, 60, -30, 40\], whose size is"),
    ),
    "nan": (
        first(bbox=[10, NAN, 30, 40]),
        *(TRAINING, "box that is not finite", r"annotation 1 .* \[10, nan, 30, 40\], which is not"),
    ),
    "infinite": (
        first(bbox=[10, 20, float("inf"), 40]),
        *(TRAINING, "box that is not finite", r"annotation 1 .* \[10, 20, inf, 40\], which is not"),
    ),
    "outside": (
        first(bbox=[128, 20, 30, 40]),
        *(TRAINING, "box outside of its image", r"annotation 1 .* outside of the 128x128 pixels"),
    ),
    "over the border": (
        first(bbox=[100, 20, 30, 40]),
        *(TRAINING, "box over the border of its image", r"annotation 1 .* beyond the 128x128"),
    ),
    "three numbers": (
        first(bbox=[10, 20, 30]),
        *(TRAINING, "incomplete annotation", r"annotation 1 has the bbox \[10, 20, 30\], which is"),
    ),
    "a word": (
        first(bbox=[10, "20", 30, 40]),
        *(TRAINING, "incomplete annotation", r"annotation 1 has the bbox \[10, '20', 30, 40\],"),
    ),
    "no box": (
        first(bbox=None),
        *(TRAINING, "incomplete annotation", r"annotation 1 has no 'bbox'"),
    ),
    "duplicate annotation": (
        lambda content: content["annotations"][-1].update(id=1),
        *(TRAINING, "annotation id used twice"),
        r"annotation 1 of image 3 \('000003.jpg'\) has the id of another annotation, of image 1",
    ),
    "unknown image": (
        first(image_id=99),
        *(TRAINING, "annotation of no image", r"annotation 1 of image 99 belongs to an image that"),
    ),
    "unknown category": (
        first(category_id=11),
        *(TRAINING, "annotation of no category", r"annotation 1 .* has the category_id 11, which"),
    ),
    "duplicate category": (
        lambda content: content["categories"].append({"id": 1, "name": "zero"}),
        *(TRAINING, "category id used twice", r"category 1 \('zero'\) has the id of '0' too"),
    ),
    "ignore": (
        first(ignore=1),
        *(TRAINING, "annotation marked to be ignored", r"annotation 1 .* has ignore 1, which"),
    ),
    "iscrowd": (
        first(iscrowd="no"),
        *(TRAINING, "iscrowd neither 0 nor 1", r"annotation 1 .* has iscrowd 'no', which"),
    ),
    "crowds only": (
        only_crowds,
        *(TRAINING, "image with crowds only", r"image 2 \('000002.jpg'\) has crowds only"),
    ),
    "no annotations": (
        no_annotations,
        *(TRAINING, "image without annotations", r"image 2 \('000002.jpg'\) has no annotations"),
    ),
    "no objects at all": (
        lambda content: content.update(annotations=[]),
        *(TRAINING, "dataset without a single object", r"the dataset has no annotation of an obj"),
    ),
    "classes": (
        lambda content: content["categories"].append({"id": 11, "name": "ten"}),
        *(Use(num_classes=10, num_classes_key="MODEL.RETINANET.NUM_CLASSES"),),
        "number of classes unlike the model's",
        r"the dataset has 11 categories, but MODEL.RETINANET.NUM_CLASSES is 10; set it to 11",
    ),
    "registered classes": (
        lambda content: content["categories"][0].update(name="nought"),
        *(Use(registered_classes=tuple("0123456789")), "categories unlike the registered ones"),
        r"the dataset has the categories \('nought', '1', .*, but is registered with \('0', '1'",
    ),
    "no area": (
        first(area=None),
        *(EVALUATION, "annotation without area or iscrowd", r"annotation 1 .* has no 'area'"),
    ),
    "no iscrowd": (
        first(iscrowd=None),
        *(EVALUATION, "annotation without area or iscrowd", r"annotation 1 .* has no 'iscrowd'"),
    ),
    "id 0": (
        first(id=0),
        *(EVALUATION, "annotation with the id 0", r"annotation 0 of image 1 .* has an id that py"),
    ),
    "flat polygon": (
        first(segmentation=[1, 2, 3, 4, 5, 6]),
        *(TRAINING, "malformed segmentation", r"annotation 1 .* which is not a list of polygons"),
    ),
    "run lengths": (
        first(segmentation={"counts": [5, 5], "size": [128, 128]}),
        *(TRAINING, "malformed segmentation", r"annotation 1 .* 'counts' do not add up"),
    ),
    "two points": (
        first(segmentation=[[1, 2, 3, 4]]),
        *(TRAINING, "segmentation without a polygon", r"annotation 1 .* no polygon has three poi"),
    ),
}

MASK_FAULTS = {
    "none": (first(segmentation=[]), r"has no segmentation, which MODEL.MASK_ON needs"),
    "nan": (first(segmentation=[[1, 2, 3, 4, NAN, 6]]), r"coordinate that is no finite number"),
    "word": (first(segmentation=[[1, 2, 3, 4, "5", 6]]), r"coordinate that is no finite number"),
    "run lengths": (
        first(segmentation={"counts": [0, 128 * 128], "size": [128, 128]}),
        r"has run lengths .* which need INPUT.MASK_FORMAT bitmask",
    ),
}


@pytest.mark.parametrize(("change", "use", "kind", "sentence"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_named_with_file_and_record(
    change, use, kind, sentence, content, checked, tmp_path
):
    change(content)
    found = checked(content, use)
    assert kind in dict(found)
    # Where a record goes missing, its annotations belong to none: that is the only thing beside.
    others = {name for name, _ in found} - {kind, "annotation of no image"}
    if kind == "image id used twice":
        others -= {"image without annotations"}
    assert not others
    assert dict(found)[kind].startswith(f"{tmp_path / 'train.json'}: ")
    assert re.search(sentence, dict(found)[kind])


def test_faults_are_counted_one_by_one(content, checked):
    for annotation in content["annotations"][:5]:
        annotation["bbox"][2] = 0
    found = checked(content, TRAINING)
    assert [name for name, _ in found] == ["box without area"] * 5
    assert len({sentence for _, sentence in found}) == 5


@pytest.mark.parametrize(("change", "sentence"), MASK_FAULTS.values(), ids=MASK_FAULTS)
def test_what_gives_no_mask_matters_to_models_with_masks_only(change, sentence, content, checked):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
    assert checked(content, MASKS) == []
    change(content)
    assert checked(content, TRAINING) == []
    ((kind, found),) = checked(content, MASKS)
    assert kind == "segmentation that gives no mask"
    assert re.search(r"annotation 1 of image 1 .*" + sentence, found)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", r"train.json' ends in the middle: it is truncated \(Expecting value, line 1"),
        ('{"images": [{"id": 1, "file_na', r"ends in the middle: it is truncated \(Untermin.* co"),
        ('{"images": [{"id": 1', r"ends in the middle: it is truncated"),
        ("<html></html>", r"train.json' is not JSON \(Expecting value, line 1, column 1\)"),
        ("[" * 100_000, r"train.json' is not JSON"),
        ("[1, 2]", r"is not COCO's: it holds \[1, 2\], not an object with lists"),
        ('{"info": {}}', r"is not COCO's: it has no list of 'images'"),
        ('{"images": [], "categories": [1]}', r"has no images: the dataset is empty"),
        ('{"images": [1], "categories": []}', r"has no categories: the dataset is empty"),
        (
            '{"images": [1], "categories": ["a"]}',
            r"the category 'a' is not COCO's, which has an id",
        ),
        ('{"images": [1], "categories": [{"id": 1}]}', r"the category \{'id': 1\} is not COCO's"),
    ],
)
def test_a_file_that_is_not_cocos_is_refused(text, sentence, checked):
    with pytest.raises(ValueError, match=sentence):
        checked(text, TRAINING)


def test_ids_of_both_types_are_refused(content, checked):
    content["images"][0]["id"] = "one"
    with pytest.raises(ValueError, match=r"ids of images are numbers and .* instance 2 and 'one'"):
        checked(content, TRAINING)


def test_numbers_beyond_all_numbers_are_refused(content, checked):
    first(bbox=[10**400, 20, 30, 40])(content)
    with pytest.raises(ValueError, match=r"train.json: a size or box is beyond all numbers"):
        checked(content, TRAINING)


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_is_found_sound(split, coco_slice):
    root = coco_slice / "coco"
    path = root / "annotations" / f"instances_{split}2017.json"
    for mask_format in ("bitmask", None):
        use = Use(split == "train", 80, "MODEL.RETINANET.NUM_CLASSES", mask_format)
        assert check_annotations(AnnotationFile(path, root / f"{split}2017"), use) == []
