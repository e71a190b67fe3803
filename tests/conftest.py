"""What several tests share."""

import json
import os
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, start_server
from hypothesis import settings

from sasa_det.ops import available_backends, use_backend
from sasa_det.ops.native import library

CONFIGS = ROOT / "configs"
# A slice of real COCO in detectron2's layout; users do not have it.
COCO_SLICE = ROOT.parent / "shared" / "data"

# The built-in dataset is generated once, for the demo and for the tests.
os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))

# The same cases each time, unless `--hypothesis-profile long` asks for many new ones.
settings.register_profile("long", max_examples=2000, deadline=None)
settings.register_profile("short", max_examples=200, deadline=None, derandomize=True)
settings.load_profile("short")


def pytest_configure() -> None:
    start_server()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """torch seeds itself differently in each process; a test is to pass or fail alike each time."""
    torch.manual_seed(0)


@pytest.fixture
def call_tool(monkeypatch, capsys) -> Callable[..., tuple[str | int | None, str]]:
    """Calls a script of tools/ in this process; what it exits with, and what it printed."""

    def run(name: str, *arguments: object) -> tuple[str | int | None, str]:
        monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
        code = None
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as ending:
            code = ending.code
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.fixture(params=library.INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """The native kernels run with each in turn, as far as this machine has it."""
    level = library.INSTRUCTION_SETS.index(request.param)
    if available_backends()["native"] is not None or level > library.instruction_set():
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setattr(library, "instruction_set", lambda: level)


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """A folder with four pictures of the built-in dataset, ``val``, and ``val.json``."""
    from sasa_det.data.digits import generate_digits

    folder = tmp_path_factory.mktemp("digits")
    generate_digits(folder, "val", 4, seed=1)
    return folder


@pytest.fixture(scope="session")
def untrained_demo(tmp_path_factory) -> list[str]:
    """How to call a tool with the demo's model as it starts; it detects something everywhere."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from sasa_det.config import load_config

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("demo")
    config = str(CONFIGS / "demo.yaml")
    DetectionCheckpointer(build_model(load_config(config)), str(folder)).save("model")
    weights = ["MODEL.WEIGHTS", str(folder / "model.pth")]
    return ["--config", config, *weights, "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="session")
def coco_slice() -> Path:
    if not (COCO_SLICE / "coco" / "annotations").is_dir():
        pytest.skip(f"no slice of COCO at {COCO_SLICE}")
    return COCO_SLICE


@pytest.fixture(scope="session")
def eight_coco_images(coco_slice, tmp_path_factory) -> Path:
    """A datasets folder with the same eight images to train on and to evaluate on.

    Those whose smallest object is the largest: few pixels are left at the tests' sizes.
    """
    coco = coco_slice / "coco"
    content = json.loads((coco / "annotations" / "instances_train2017.json").read_text())
    smallest: dict[int, float] = {}
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        smallest[image_id] = min(smallest.get(image_id, float("inf")), annotation["area"])
    chosen = set(sorted(smallest, key=smallest.__getitem__, reverse=True)[:8])
    subset = {
        **content,
        "images": [image for image in content["images"] if image["id"] in chosen],
        "annotations": [a for a in content["annotations"] if a["image_id"] in chosen],
    }
    datasets = tmp_path_factory.mktemp("eight")
    (datasets / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (datasets / "coco" / f"{split}2017").symlink_to(coco / "train2017")
        path = datasets / "coco" / "annotations" / f"instances_{split}2017.json"
        path.write_text(json.dumps(subset))
    return datasets


@pytest.fixture(params=["eager", "native"])
def backend(request) -> Iterator[str]:
    """Everything within the test is computed by it; Triton has its own tests."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param
