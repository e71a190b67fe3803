"""What several tests share."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
# A slice of real COCO in detectron2's layout; users do not have it.
COCO_SLICE = ROOT.parent / "shared" / "data"

# Generated data of the tests goes where the tests' other files go, not into the repository.
os.environ.setdefault("DETECTRON2_DATASETS", str(ROOT / "datasets"))


@pytest.fixture(scope="session")
def coco_slice() -> Path:
    if not (COCO_SLICE / "coco" / "annotations").is_dir():
        pytest.skip(f"no slice of COCO at {COCO_SLICE}")
    return COCO_SLICE
