"""What several tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT

from sasa_det.ops import available_backends, use_backend

CONFIGS = ROOT / "configs"
# A slice of real COCO in detectron2's layout; users do not have it.
COCO_SLICE = ROOT.parent / "shared" / "data"

# The built-in dataset is generated once, for the demo and for the tests.
os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """torch seeds itself differently in each process; a test is to pass or fail alike each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def coco_slice() -> Path:
    if not (COCO_SLICE / "coco" / "annotations").is_dir():
        pytest.skip(f"no slice of COCO at {COCO_SLICE}")
    return COCO_SLICE


@pytest.fixture(params=["eager", "native"])
def backend(request) -> Iterator[str]:
    """Everything within the test is computed by it; Triton has its own tests."""
    reason = available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param
