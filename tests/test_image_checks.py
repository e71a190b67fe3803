"""Image files: each fault is named, and what detectron2 reads as it should is no finding."""

import importlib.util
import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS, ROOT
from detectron2.data.detection_utils import read_image

from sasa_det.config import load_config
from sasa_det.data import build_test_mapper
from sasa_det.data.annotation_file import AnnotationFile
from sasa_det.data.findings import Use
from sasa_det.data.image_checks import check_images

WIDTH, HEIGHT = 64, 48
RAMP = np.add.outer(np.arange(HEIGHT) * 2, np.arange(WIDTH) * 2).astype(np.uint8)
COLOURS = np.stack([RAMP, RAMP // 2, 255 - RAMP], axis=-1)
HALF_OPAQUE = np.where(np.arange(WIDTH) < WIDTH // 2, 255, 0)[None].repeat(HEIGHT, 0)


def save(pixels, path, mode=None, **options):
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def cut_off(path, number):
    path.write_bytes(path.read_bytes()[:-number])


def colours_of_16_bits(path):
    """Pillow reads such PNGs, but does not write them."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in COLOURS)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def found(tmp_path):
    """The findings of one image file, of which the record says 64x48 unless it is told."""

    def check(name, size=(WIDTH, HEIGHT)):
        image = {"id": 7, "file_name": name, "width": size[0], "height": size[1]}
        content = {"images": [image], "categories": [{"id": 1, "name": "a"}], "annotations": []}
        path = tmp_path / "records.json"
        path.write_text(json.dumps(content))
        (findings,) = check_images(AnnotationFile(path, tmp_path), Use(), threads=1)
        begins = f"{tmp_path / name}: image 7 of {path} "
        assert all(str(finding).startswith(begins) for finding in findings)
        return {finding.kind.name: finding.message for finding in findings}

    return check


SOUND = {
    "colour.jpg": lambda path: save(COLOURS, path, quality=95),
    "cmyk.jpg": lambda path: save(COLOURS, path, "CMYK", quality=95),
    "colour.png": lambda path: save(COLOURS, path),
    "palette.png": lambda path: Image.fromarray(COLOURS).quantize(64).save(path),
    "opaque.png": lambda path: save(COLOURS, path, "RGBA"),
    "colour.webp": lambda path: save(COLOURS, path, lossless=True),
    "colour.bmp": lambda path: save(COLOURS, path),
    "colour.gif": lambda path: save(COLOURS, path),
    "colours_of_16_bits.png": colours_of_16_bits,
    "upright.jpg": lambda path: save(COLOURS, path, quality=95, exif=turned(1)),
}
SOUND_GREY = {
    "grey.jpg": lambda path: save(RAMP, path, quality=95),
    "grey.png": lambda path: save(RAMP, path),
    "dark_16_bits.png": lambda path: save(RAMP.astype(np.uint16), path),
    "fractions_of_255.tif": lambda path: save(RAMP.astype(np.float32), path),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_is_read_as_it_should_be_is_no_finding(name, found, tmp_path):
    SOUND[name](tmp_path / name)
    assert found(name) == {}
    difference = read_image(tmp_path / name, "RGB").astype(int) - COLOURS
    assert abs(difference).mean() < 1


@pytest.mark.parametrize("name", SOUND_GREY)
def test_grey_is_no_finding_unless_it_is_cut(name, found, tmp_path):
    SOUND_GREY[name](tmp_path / name)
    assert found(name) == {}
    assert abs(read_image(tmp_path / name, "BGR").astype(int) - RAMP[..., None]).max() <= 4
    mapper = build_test_mapper(load_config(str(CONFIGS / "demo.yaml")))
    assert mapper({"file_name": str(tmp_path / name)})["image"].max() > 100


@pytest.mark.parametrize(
    ("pixels", "name", "values"),
    [
        (RAMP.astype(np.uint16) * 256, "grey.png", "from 0 to 56320 (mode I;16)"),
        (RAMP.astype(np.uint16) * 256, "grey.tif", "from 0 to 56320 (mode I;16)"),
        (RAMP.astype(np.int32) - 50, "grey.tif", "from -50 to 170 (mode I)"),
        (RAMP.astype(np.float32) / 255, "grey.tif", "from 0.0 to 0.86"),
    ],
    ids=["png", "tif", "negative", "fractions"],
)
def test_greys_that_detectron2_cuts_to_white_or_black_are_found(
    pixels, name, values, found, tmp_path
):
    save(pixels, tmp_path / name)
    (message,) = found(name).values()
    assert message.startswith(f"has grey values {values}")
    assert abs(read_image(tmp_path / name, "BGR").astype(int) - RAMP[..., None]).mean() > 10
    mapper = build_test_mapper(load_config(str(CONFIGS / "demo.yaml")))
    sentence = f"The image '{tmp_path / name}' cannot be used: it {message}; scale them to 8 bits"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        mapper({"file_name": str(tmp_path / name)})


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_found_where_it_hides_something(mode, found, tmp_path):
    with_alpha = np.dstack([COLOURS, HALF_OPAQUE.astype(np.uint8)])
    if mode == "P":
        save(COLOURS, tmp_path / "a.png", "P", transparency=bytes(128))
    else:
        save(with_alpha, tmp_path / "a.png", mode)
    (message,) = found("a.png").values()
    assert re.fullmatch(r"is transparent in \d+% of its pixels", message)
    if mode != "P":
        assert "50%" in message
    assert read_image(tmp_path / "a.png", "BGR")[:, WIDTH // 2 :].mean() > 50  # not hidden


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_a_picture_turned_upside_down_is_found(orientation, found, tmp_path):
    """Its size cannot tell whether the boxes were drawn on the turned picture."""
    save(COLOURS, tmp_path / "a.jpg", exif=turned(orientation))
    assert "image turned by its EXIF orientation" in found("a.jpg")


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_picture_turned_on_its_side_is_judged_by_its_size(orientation, found, tmp_path):
    save(COLOURS, tmp_path / "a.jpg", exif=turned(orientation))
    assert found("a.jpg", size=(HEIGHT, WIDTH)) == {}
    (message,) = found("a.jpg").values()
    assert message == (
        "has 48x64 pixels, but its record says 64x48; its EXIF orientation turns it when it is read"
    )
    save(RAMP[:, :HEIGHT], tmp_path / "square.jpg", exif=turned(orientation))
    assert "EXIF" in " ".join(found("square.jpg", size=(HEIGHT, HEIGHT)))


def test_a_size_unlike_the_records_is_found(found, tmp_path):
    save(COLOURS, tmp_path / "a.jpg")
    assert found("a.jpg", size=(64, 47)) == {
        "image size unlike its record": "has 64x48 pixels, but its record says 64x47"
    }


@pytest.mark.parametrize(
    ("name", "break_it", "reason"),
    [
        ("a.jpg", lambda path: cut_off(path, 200), "truncated"),
        ("a.jpg", lambda path: cut_off(path, 2), "truncated"),
        ("a.png", lambda path: cut_off(path, 40), "truncated"),
        ("a.jpg", lambda path: path.write_bytes(b""), "cannot identify image file"),
        ("a.jpg", lambda path: path.write_text("<html>not found</html>"), "cannot identify image"),
    ],
    ids=["truncated", "two bytes missing", "truncated PNG", "empty", "a page of the web"],
)
def test_an_unreadable_image_is_named_by_check_and_mapper(name, break_it, reason, found, tmp_path):
    save(COLOURS, tmp_path / name)
    break_it(tmp_path / name)
    message = found(name)["unreadable image"]
    assert re.search(r"^cannot be read \(.*" + reason, message, re.IGNORECASE)
    mapper = build_test_mapper(load_config(str(CONFIGS / "demo.yaml")))
    record = {"file_name": str(tmp_path / name), "image_id": 7, "width": WIDTH, "height": HEIGHT}
    sentence = rf"^The image '{tmp_path / name}' \(image_id 7\) cannot be used: .*{reason}"
    with pytest.raises(ValueError, match=f"(?i){sentence}"):
        mapper(record)


def test_a_file_name_does_not_get_to_steer_the_terminal(tmp_path):
    name = "\x1b[2J.jpg"
    (tmp_path / name).write_bytes(b"")
    image = {"id": 7, "file_name": name, "width": WIDTH, "height": HEIGHT}
    content = {"images": [image], "categories": [{"id": 1, "name": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    ((finding,),) = check_images(AnnotationFile(tmp_path / "a.json", tmp_path), Use(), threads=1)
    assert "x1b[2J.jpg': image 7" in str(finding)
    assert "\x1b" not in str(finding)


def test_a_folder_in_the_place_of_an_image_is_found(found, tmp_path):
    (tmp_path / "a.jpg").mkdir()
    assert "unreadable image" in found("a.jpg")


def test_a_png_with_a_wrong_checksum_is_found_though_it_can_be_read(found, tmp_path):
    path = tmp_path / "a.png"
    save(COLOURS, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    assert set(found("a.png")) == {"damaged image"}


def load_tool():
    spec = importlib.util.spec_from_file_location("check", ROOT / "tools" / "check_dataset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Whether the tool finds no error in four images with these annotations, and what it prints."""
    tool = load_tool()
    for number in range(1, 5):
        save(COLOURS, tmp_path / f"{number}.png")

    def run(annotations, *options):
        sizes = {"width": WIDTH, "height": HEIGHT}
        content = {
            "images": [{"id": n, "file_name": f"{n}.png", **sizes} for n in range(1, 5)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": annotations,
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        files = ["--annotations", tmp_path / "a.json", "--images", tmp_path, *options]
        monkeypatch.setattr("sys.argv", ["check_dataset.py", *map(str, files)])
        return tool.main(tool.parse_args()), capsys.readouterr().out

    return run


def annotation(number, **changes):
    box = {"bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0, "category_id": 1}
    return {"id": number, "image_id": (number - 1) % 4 + 1, **box, **changes}


def test_a_sound_dataset_is_described_and_passes(report):
    is_sound, printed = report([annotation(number) for number in range(1, 6)])
    assert is_sound
    assert "4 images, 5 boxes (5 small, 0 medium, 0 large, 0 crowds), 2 categories." in printed
    assert "Categories without a box: dog." in printed
    assert printed.strip().endswith("For training: 0 errors, 0 warnings, 0 notes.")


def test_errors_come_before_warnings_with_examples_and_what_becomes_of_them(report, tmp_path):
    flat = [annotation(number, bbox=[1, 2, 0, 4]) for number in range(1, 6)]
    cut_off(tmp_path / "3.png", 100)
    is_sound, printed = report(flat)
    assert not is_sound
    assert "For training: 1 error, 5 warnings, 0 notes." in printed
    error = printed.index("error: unreadable image, 1; training stops when it comes to it")
    warning = printed.index("warning: box without area, 5; training leaves the box out")
    assert error < warning
    assert f"{tmp_path / '3.png'}: image 3 of {tmp_path / 'a.json'} cannot be read" in printed
    assert printed.count("which has no area") == 3
    assert printed.strip().endswith("and 2 more")


def test_a_config_adds_the_number_of_classes(report):
    config = ["--config", str(CONFIGS / "demo.yaml")]
    is_sound, printed = report([annotation(n) for n in range(1, 5)], *config)
    assert not is_sound
    assert "has 2 categories, but MODEL.RETINANET.NUM_CLASSES is 10; set it to 2" in printed
    two = ["MODEL.RETINANET.NUM_CLASSES", "2"]
    assert report([annotation(n) for n in range(1, 5)], *config, *two)[0]


def test_for_evaluation_the_annotations_need_an_area(report):
    annotations = [annotation(number) for number in range(1, 5)]
    del annotations[0]["area"]
    assert report(annotations)[0]
    is_sound, printed = report(annotations, "--evaluation")
    assert not is_sound
    assert "For evaluation: 1 error," in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("", "say what to check: --annotations and --images, --dataset, or --config"),
        ("--annotations a.json", "belong together"),
        ("--annotations a.json --images . MODEL.DEVICE cpu", "there is no --config"),
        ("--dataset sasa_digits_val --threads 0", "--threads is 0"),
    ],
)
def test_a_wrong_command_is_answered_in_one_sentence(options, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_dataset.py", *options.split()])
    with pytest.raises(SystemExit):
        load_tool().parse_args()
    assert sentence in capsys.readouterr().err
