"""Long runs and odd images: memory stays flat, sizes pass or are refused, a seed repeats a run."""

import gc
import json
import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from sasa_det.config import load_config
from sasa_det.data import build_test_mapper
from sasa_det.layers import LocalSelfAttention2d, StemSelfAttention2d

DEMO = str(CONFIGS / "demo.yaml")
MIB = 2**20


def resident_memory():
    """Of this process, in bytes, without what Python has yet to collect."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(step, steps, largest):
    """In bytes, from the first quarter of the steps on; each step has another size."""
    sizes = random.Random(0)
    step(largest, largest)
    for index in range(steps):
        step(sizes.randint(1, largest), sizes.randint(1, largest))
        if index == steps // 4:
            before = resident_memory()
    grown = resident_memory() - before
    print(f"{grown / MIB:.1f} MiB more after {steps} steps")
    return grown


needs_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")


@needs_proc
def test_memory_of_the_layers_is_flat_while_sizes_change():
    stem = StemSelfAttention2d(3, 16, num_heads=2)
    layers = nn.Sequential(stem, nn.ReLU(), LocalSelfAttention2d(16, 16, 5, num_heads=2))

    def step(height, width):
        height, width = 4 * -(-height // 4), 4 * -(-width // 4)
        layers(torch.randn(2, 3, height, width)).square().sum().backward()
        layers.zero_grad()

    assert growth(step, 200, largest=48) < 8 * MIB


@needs_proc
@pytest.mark.slow
def test_memory_of_a_training_is_flat_over_a_thousand_steps():
    model = build_model(load_config(DEMO)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(height, width):
        height, width = height + 33, width + 33  # batch norm needs more than one position in res5
        boxes = torch.tensor([[2.0, 2.0, width - 2.0, height - 2.0]])
        target = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.tensor([3]))
        image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        losses = model([{"image": image, "instances": target, "height": height, "width": width}])
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    with EventStorage():
        assert growth(step, 1000, largest=160) < 32 * MIB


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    # Sure of everything, so that there are boxes to look at.
    return build_model(load_config(DEMO, ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"])).eval()


@torch.no_grad()
def detect(detector, height, width):
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
    return detector([{"image": image, "height": height, "width": width}])[0]["instances"]


@pytest.mark.parametrize("height", [1, 3, 33])
@pytest.mark.parametrize("width", [1, 2, 31, 4000])
def test_images_of_any_size_are_searched(height, width, detector):
    for shape in ((height, width), (width, height)):
        found = detect(detector, *shape)
        assert found.image_size == shape
        boxes = found.pred_boxes.tensor
        assert boxes.isfinite().all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= shape[1]).all()
        assert (boxes[:, 3] <= shape[0]).all()


@pytest.mark.slow
def test_an_image_of_four_thousand_pixels_each_way_is_searched_in_bounded_memory(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sasa_det, torch\n"
        "from sasa_det.config import load_config\n"
        "from detectron2.modeling import build_model\n"
        f"model = build_model(load_config({DEMO!r})).eval()\n"
        "with torch.no_grad():\n"
        "    image = torch.zeros(3, 4000, 4000, dtype=torch.uint8)\n"
        "    model([{'image': image, 'height': 4000, 'width': 4000}])\n"
    )
    run = run_tool(program)
    assert run.returncode == 0, run.stderr[-3000:]
    print(f"{run.peak_memory / 2**30:.1f} GiB")
    assert run.peak_memory < 8 * 2**30


@pytest.mark.parametrize(
    ("size", "resized"), [((1, 1), (128, 128)), ((20, 1), (1333, 67)), ((1, 20), (67, 1333))]
)
def test_small_and_narrow_images_are_resized_as_detectron2_does(size, resized, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    cfg = load_config(DEMO, ["INPUT.MAX_SIZE_TEST", "1333"])
    sample = build_test_mapper(cfg)({"file_name": str(tmp_path / "a.png")})
    assert tuple(sample["image"].shape[1:]) == resized[::-1]


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000)])
def test_an_image_that_resizing_leaves_no_pixel_of_is_refused_by_name(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png' cannot be used: .*height and width must be > 0"):
        build_test_mapper(load_config(DEMO))({"file_name": str(tmp_path / "a.png")})


def test_the_same_seed_gives_the_same_training_to_the_bit(tmp_path):
    """On the CPU, with workers that load and change the images."""
    logs, weights = [], []
    for name in ("first", "second"):
        keys = ["SOLVER.MAX_ITER", 3, "SOLVER.WARMUP_ITERS", 1, "DATASETS.TEST", "()", "SEED", 5]
        keys += ["INPUT.MIN_SIZE_TRAIN", "(64, 96)", "INPUT.RANDOM_FLIP", "horizontal"]
        keys += ["DATALOADER.NUM_WORKERS", 2, "OUTPUT_DIR", tmp_path / name]
        run = run_tool("tools/train_net.py", "--config", DEMO, *keys)
        assert run.returncode == 0, run.stderr[-3000:]
        (log,) = map(json.loads, (tmp_path / name / "metrics.json").read_text().splitlines())
        logs.append({key: value for key, value in log.items() if "time" not in key})
        checkpoint = torch.load(tmp_path / name / "model_final.pth", weights_only=True)
        weights.append(checkpoint["model"])
    assert logs[0] == logs[1]
    assert {"total_loss", "loss_cls", "loss_box_reg"} <= set(logs[0])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
