"""``tools/run_table2.py``: trains the rows, continues where it was stopped, writes the table."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT

import sasa_det  # noqa: F401

# isort: split
from detectron2.data import DatasetCatalog

from sasa_det.analysis.progress import Pace, PlannedRun
from sasa_det.config import load_config
from sasa_det.data.digits import generate_digits
from sasa_det.evaluation import AP_NAMES

CONVOLUTION, ATTENTION = ROWS = ("retinanet_conv", "retinanet_full_attn")
# The demo's model on the smallest pictures; a checkpoint is there soon.
STEPS = 60
QUICK = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(32,)", "INPUT.MIN_SIZE_TEST", "32"]
QUICK += ["SOLVER.CHECKPOINT_PERIOD", "10", "SOLVER.MAX_ITER", str(STEPS)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Eight generated pictures to train on, four to evaluate on."""
    datasets = tmp_path_factory.mktemp("datasets")
    for seed, (split, number) in enumerate({"train": 8, "val": 4}.items()):
        generate_digits(datasets / "sasa_digits", split, number, seed)
    return {**os.environ, "DETECTRON2_DATASETS": str(datasets)}


def command(output, *options, rows=ROWS):
    shared = ["--config", "configs/demo.yaml", "--rows", *rows, "--timed-steps", "5"]
    tool = [sys.executable, "tools/run_table2.py"]
    return [*tool, *shared, "--output", str(output), *QUICK, *options]


def run(arguments, environment):
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, environment):
    """Stopped in the midst of its second row; what the first left, and when."""
    output = tmp_path_factory.mktemp("table2")
    tool = subprocess.Popen(
        command(output), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    checkpoint = output / ATTENTION / "seed0" / "last_checkpoint"
    while not checkpoint.is_file():
        assert tool.poll() is None, tool.stdout.read().decode()
        time.sleep(0.01)
    tool.send_signal(signal.SIGTERM)
    said = tool.communicate(timeout=60)[0].decode()
    weights = output / CONVOLUTION / "seed0" / "model_final.pth"
    return output, tool.returncode, said, weights.stat().st_mtime_ns


def test_it_says_what_it_will_cost_and_how_to_continue_when_it_is_stopped(interrupted):
    output, code, said, _ = interrupted
    assert code == 130
    assert "Each run: 60 steps of 2 images, 120 images. 0 of 2 runs are finished." in said
    assert f"{CONVOLUTION}, seed 0: AP " in said
    assert said.rstrip().endswith(" ".join(QUICK[-2:]))  # the command, after "continues:"
    assert not (output / ATTENTION / "seed0" / "evaluation.json").exists()
    # The table is there as soon as a row is.
    assert (output / "table2.md").read_text().count(f"| `{ATTENTION}` ") == 1


@pytest.fixture(scope="module")
def continued(interrupted, environment):
    return run(command(interrupted[0]), environment)


def test_it_continues_and_trains_nothing_twice(interrupted, continued):
    output, _, _, finished_at = interrupted
    assert continued.returncode == 0, continued.stderr
    assert (output / CONVOLUTION / "seed0" / "model_final.pth").stat().st_mtime_ns == finished_at
    starts = [
        int(line.rsplit(" ", 1)[1])
        for line in (output / ATTENTION / "seed0" / "console.txt").read_text().splitlines()
        if "Starting training from iteration" in line
    ]
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1] < STEPS


def test_each_run_is_the_shared_config_with_the_keys_of_its_row(interrupted, continued):
    for row in ROWS:
        config = yaml.safe_load((interrupted[0] / row / "seed0" / "config.yaml").read_text())
        sasa = config["MODEL"]["SASA"]
        attention = row == ATTENTION
        assert (sasa["STEM"] == "attention", sasa["HEAD_ATTENTION"]) == (attention, attention)
        assert (len(sasa["ATTENTION_STAGES"]), sasa["KERNEL_SIZE"]) == (4 * attention, 5)


def test_the_table_has_the_figures_of_the_runs(interrupted, continued):
    output = interrupted[0]
    table = (output / "table2.md").read_text()
    assert table in continued.stdout
    content = json.loads((output / "table2.json").read_text())
    assert [row["row"] for row in content["rows"]] == list(ROWS)
    assert content["seconds"] > 0
    for row in content["rows"]:
        run_folder = output / row["row"] / "seed0"
        (results,) = json.loads((run_folder / "evaluation.json").read_text()).values()
        figures = row["figures"]["0"]
        assert {name: figures[name] for name in AP_NAMES} == {
            name: results["bbox"][name] for name in AP_NAMES
        }
    convolution, attention = content["rows"]
    assert attention["params"] < convolution["params"]


@pytest.fixture
def refusal(monkeypatch, capsys):
    """The sentence with which a command is refused, before anything runs."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import run_table2

    def sentence(arguments):
        monkeypatch.setattr(sys, "argv", arguments[1:])
        try:
            run_table2.main(run_table2.parse_args())
        except SystemExit:
            return capsys.readouterr().err
        except ValueError as error:
            return str(error)

    return sentence


def test_a_finished_run_of_another_config_is_refused(interrupted, continued, refusal):
    sentence = refusal(command(interrupted[0], "SOLVER.BASE_LR", "0.1"))
    assert "retinanet_conv/seed0' holds a run with SOLVER.BASE_LR 0.003, not 0.1" in sentence


def test_the_time_left_is_that_of_the_runs_in_their_order(tmp_path):
    """Two at once, of 100 s and 50 s; the third begins when the second has ended."""
    cfg = load_config("configs/demo.yaml", ["SOLVER.MAX_ITER", "100", "SOLVER.IMS_PER_BATCH", "2"])
    images = len(DatasetCatalog.get("sasa_digits_val"))
    slow, fast, untimed = (
        PlannedRun(row, 0, tmp_path / row, [], cfg) for row in ("slow", "fast", "untimed")
    )
    pace = Pace(at_once=2)
    assert pace.left([(slow, 0)], [fast]) is None
    pace.of_row |= {"slow": 1.0, "fast": 0.5}
    steps = 100 + images / 2 / 3
    assert pace.left([(slow, 40)], []) == pytest.approx(steps - 40)
    assert pace.left([], [slow, fast, untimed]) == pytest.approx((0.5 + 0.75) * steps)


def test_two_at_work_in_one_folder_are_refused(interrupted, continued, refusal):
    with (interrupted[0] / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "is at work in" in refusal(command(interrupted[0]))


def test_unknown_rows_and_keys_that_make_the_rows_are_refused(tmp_path, refusal):
    sentence = refusal(command(tmp_path, rows=["retinanet"]))
    assert "there is no row retinanet; the rows are retinanet_conv," in sentence
    sentence = refusal(command(tmp_path, "MODEL.SASA.STEM", "conv"))
    assert "MODEL.SASA.STEM is not for the command line" in sentence
