"""A training whose loss is not finite stops with what is needed to repeat the step, or skips it."""

import re

import pytest
import torch
from commands import run_tool

# The first step's update leaves weights with which no loss is finite.
DIVERGING = ["tools/train_net.py", "--config", "configs/demo.yaml", "--resume"]
DIVERGING += ["DATASETS.TRAIN", "('sasa_digits_val',)", "DATASETS.TEST", "()"]
DIVERGING += ["INPUT.MIN_SIZE_TRAIN", "(32,)", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 5]
DIVERGING += ["SOLVER.WARMUP_ITERS", 0, "SOLVER.BASE_LR", 1e30]


def sentence(run):
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    return folder, sentence(run_tool(*DIVERGING, "OUTPUT_DIR", folder))


def test_it_stops_with_step_losses_and_files(stopped):
    assert re.fullmatch(
        r"error: The loss or its gradient is not finite in step 1 \(loss_cls \S+, loss_box_reg "
        r"\S+\), whose batch is \S+\.jpg, \S+\.jpg; model_before_0000001\.pth has all from before "
        r"it: --resume repeats the step, and with SOLVER\.MAX_SKIPPED_BATCHES goes on without it\.",
        stopped[1],
    )


def test_what_it_saved_is_the_state_before_the_step(stopped):
    folder, said = stopped
    saved = torch.load(folder / "model_before_0000001.pth", weights_only=True)
    assert saved["iteration"] == saved["trainer"]["iteration"] == 0
    assert all(x.isfinite().all() for x in saved["model"].values())
    assert saved["diverged"]["step"] == 1
    assert ", ".join(saved["diverged"]["files"]) in said


def test_resuming_repeats_the_step_or_skips_as_many_as_it_may(stopped):
    folder, said = stopped
    assert sentence(run_tool(*DIVERGING, "OUTPUT_DIR", folder)) == said
    run = run_tool(*DIVERGING, "SOLVER.MAX_SKIPPED_BATCHES", 2, "OUTPUT_DIR", folder)
    assert "in step 3" in sentence(run)
    assert "; 2 others were skipped; model_before_0000003.pth has all" in sentence(run)
    assert "skipped, the 2. of at most 2 (SOLVER.MAX_SKIPPED_BATCHES)" in run.stdout
    # They count on when that is resumed.
    saved = torch.load(folder / "model_before_0000003.pth", weights_only=True)
    assert saved["trainer"]["_trainer"]["num_skipped"] == 2
