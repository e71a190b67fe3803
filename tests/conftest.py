"""What several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# A slice of real COCO in detectron2's layout; users do not have it.
COCO_SLICE = ROOT.parent / "shared" / "data"

# The built-in dataset is generated once, for the demo and for the tests.
os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))


@pytest.fixture(scope="session")
def coco_slice() -> Path:
    if not (COCO_SLICE / "coco" / "annotations").is_dir():
        pytest.skip(f"no slice of COCO at {COCO_SLICE}")
    return COCO_SLICE
