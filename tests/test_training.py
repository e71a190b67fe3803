"""``tools/train_net.py``: trains, resumes, evaluates; what is wrong it says in one sentence."""

import json
import math
import shutil

import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS

from sasa_det.checkpoint import check_weights
from sasa_det.config import load_config
from sasa_det.data.digits import generate_digits

AP_NAMES = {"AP", "AP50", "AP75", "APs", "APm", "APl"}
# The demo's model, on fewer and smaller pictures, for a few steps.
QUICK = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "1", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
QUICK += ["INPUT.MIN_SIZE_TEST", "64"]


def train_net(*arguments, datasets=None, check=True):
    environment = {"DETECTRON2_DATASETS": str(datasets)} if datasets else {}
    run = run_tool("tools/train_net.py", *arguments, environment=environment)
    if check:
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    options = [*QUICK, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", folder]
    run = train_net("--config", "configs/demo.yaml", *options)
    return folder, run


def test_it_trains_checkpoints_and_evaluates(trained):
    folder, run = trained
    assert (folder / "model_final.pth").is_file()
    results = json.loads((folder / "evaluation.json").read_text())
    assert set(results["sasa_digits_val"]["bbox"]) >= AP_NAMES
    assert "AP,AP50,AP75,APs,APm,APl" in run.stdout + run.stderr


def test_the_spread_of_the_attention_is_logged(tmp_path):
    run_for_20 = [*QUICK, "SOLVER.MAX_ITER", 20, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path]
    train_net("--config", "configs/demo.yaml", *run_for_20)
    (metrics,) = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    # At the start attention is nearly uniform over the window of 25, less at borders.
    least, mean = metrics["attention_entropy/least"], metrics["attention_entropy/mean"]
    assert 0 < least <= mean < math.log(25)


def test_resuming_continues_where_the_checkpoint_ends(trained):
    folder, _ = trained
    run = train_net(
        *("--config", "configs/demo.yaml", "--resume", *QUICK),
        *("SOLVER.MAX_ITER", 4, "OUTPUT_DIR", folder),
    )
    assert "Starting training from iteration 2" in run.stdout + run.stderr
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3
    # The optimiser went on with its moments: it has seen all four steps.
    optimizer = checkpoint["trainer"]["_trainer"]["optimizer"]
    assert {float(moments["step"]) for moments in optimizer["state"].values()} == {4.0}


def test_a_checkpoint_of_another_backbone_is_not_resumed_from(trained):
    command = ["--config", "configs/demo.yaml", "--resume", *QUICK, "OUTPUT_DIR", trained[0]]
    run = train_net(*command, "MODEL.SASA.KERNEL_SIZE", 7, check=False)
    assert "is of another depth, width or window" in run.stderr.splitlines()[-1]


def test_another_optimizers_training_is_not_resumed(trained):
    command = ["--config", "configs/demo.yaml", "--resume", *QUICK, "OUTPUT_DIR", trained[0]]
    before = (trained[0] / "config.yaml").read_text()
    run = train_net(*command, "SOLVER.OPTIMIZER", "SGD", check=False)
    assert (trained[0] / "config.yaml").read_text() == before
    sentence = run.stderr.splitlines()[-1]
    assert "SOLVER.OPTIMIZER is SGD, but the training to resume is of another" in sentence


def test_a_training_without_an_optimizers_state_is_not_resumed(trained, tmp_path):
    """Such as detectron2 0.5 writes."""
    checkpoint = torch.load(trained[0] / "model_final.pth", weights_only=True)
    del checkpoint["trainer"]["_trainer"]["optimizer"]
    torch.save(checkpoint, tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    command = ["--config", "configs/demo.yaml", "--resume", *QUICK, "OUTPUT_DIR", tmp_path]
    run = train_net(*command, check=False)
    assert "has no optimiser's state; take it as MODEL.WEIGHTS" in run.stderr.splitlines()[-1]


def test_evaluation_alone_writes_its_figures_beside_the_checkpoint(trained, tmp_path):
    folder, _ = trained
    moved = tmp_path / "weights.pth"
    moved.write_bytes((folder / "model_final.pth").read_bytes())
    (tmp_path / "config.yaml").write_text("of the training")
    command = ["--config", "configs/demo.yaml", "--eval-only", *QUICK, "MODEL.WEIGHTS", moved]
    run = train_net(*command)
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in run.stdout + run.stderr
    results = json.loads((tmp_path / "evaluation.json").read_text())
    # Two steps detect nothing: that is an AP of zero, not an unknown one.
    assert all(results["sasa_digits_val"]["bbox"][name] is not None for name in AP_NAMES)
    assert (tmp_path / "config.yaml").read_text() == "of the training"
    run = train_net(*command, "MODEL.RETINANET.NUM_CONVS", 3, check=False)
    assert "error: The checkpoint does not fit the config" in run.stderr.splitlines()[-1]


def test_evaluation_alone_leaves_the_figures_of_a_training_that_is_finished(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0], folder)
    shutil.copy(folder / "model_final.pth", folder / "model_0000000.pth")
    of_training = json.loads((folder / "evaluation.json").read_text())
    for name in ("sasa_digits", "sasa_digits_hard"):
        generate_digits(tmp_path / name, "val", 4, seed=0)

    def evaluate(dataset, *options, flags=()):
        command = ["--config", "configs/demo.yaml", "--eval-only", *flags, *QUICK, *options]
        train_net(*command, "DATASETS.TEST", f"('{dataset}',)", datasets=tmp_path)
        return {path.name: json.loads(path.read_text()) for path in folder.glob("evaluation*")}

    files = evaluate("sasa_digits_val", "MODEL.WEIGHTS", folder / "model_0000000.pth")
    assert files["evaluation.json"] == of_training
    assert files["evaluation_model_0000000.json"].keys() == {"sasa_digits_val"}
    files = evaluate("sasa_digits_hard_val", "OUTPUT_DIR", folder, flags=["--resume"])
    assert len(files) == 2
    assert files["evaluation.json"].keys() == {"sasa_digits_val", "sasa_digits_hard_val"}
    assert files["evaluation.json"]["sasa_digits_val"] == of_training["sasa_digits_val"]


def test_without_a_gpu_it_says_that_it_runs_on_the_cpu(coco_slice, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = train_net(
        *("--config", "configs/retinanet_conv.yaml", "SOLVER.MAX_ITER", 1),
        *("SOLVER.IMS_PER_BATCH", 1, "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", 0),
        *("INPUT.IMAGE_SIZE", 128, "MODEL.RESNETS.DEPTH", 26, "OUTPUT_DIR", tmp_path),
        datasets=coco_slice,
    )
    assert "No GPU is used: running on the CPU." in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("overrides", "mismatch"),
    [
        (["MODEL.RESNETS.DEPTH", "50"], "res2.1 is not in the checkpoint; res2.2 is not in"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "128"], "weight is 64x16x1x1 there and 128x16x1x1 in"),
        (["MODEL.SASA.KERNEL_SIZE", "7"], "attention.rel_rows is 4x5x2 there and 4x7x2 in"),
    ],
    ids=lambda x: x[0],
)
def test_a_checkpoint_of_another_backbone_is_refused_before_training(trained, overrides, mismatch):
    weights = str(trained[0] / "model_final.pth")
    check_weights(weights, load_config(str(CONFIGS / "demo.yaml")))
    with pytest.raises(ValueError, match=r"of another depth, width or window") as error:
        check_weights(weights, load_config(str(CONFIGS / "demo.yaml"), overrides))
    assert mismatch in str(error.value)
    assert str(error.value).count(";") == 3


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "configs/none.yaml"], "error: The config file 'configs/none.yaml'"),
        (["--config", "configs/demo.yaml", "MODEL.SASA.K", "5"], "no config key 'MODEL.SASA.K'"),
        (["--config", "configs/demo.yaml", "MODEL.SASA.NUM_HEADS", "5"], "NUM_HEADS is 5"),
        (
            ["--config", "configs/retinanet_conv.yaml"],
            "instances_train2017.json, which does not exist; set DETECTRON2",
        ),
        (["--config", "configs/demo.yaml", "--num-gpus", "99"], "--num-gpus is 99"),
        (["--config", "configs/demo.yaml", "--num-gpus", "0"], "--num-gpus is 0"),
        (["--config", "configs/demo.yaml", "TEST.AUG.ENABLED", "True"], "TEST.AUG.ENABLED is True"),
        (["--config", "configs/demo.yaml", "--eval-only"], "--eval-only needs weights"),
        (
            ["--config", "configs/demo.yaml", "--eval-only", "--resume", "OUTPUT_DIR", "none"],
            "the last checkpoint of OUTPUT_DIR, which is 'none'",
        ),
        (["--config", "configs/demo.yaml", "MODEL.WEIGHTS", "a.pth"], "checkpoint 'a.pth'"),
        (["--config", "configs/demo.yaml", "MODEL.BACKBONE.FREEZE_AT", "2"], "FREEZE_AT is 2"),
        (
            ["--config", "configs/demo.yaml", "MODEL.RESNETS.DEPTH", "34"],
            "error: The model cannot be built: The depth (MODEL.RESNETS.DEPTH) must be one of",
        ),
        (
            ["--config", "configs/demo.yaml", "MODEL.DEVICE", "cudaa"],
            "error: MODEL.DEVICE must be a device of torch, for instance cuda or cpu, but is 'cuda",
        ),
        ([], "--config FILE is missing"),
    ],
    ids=lambda x: x.split("'")[0][:30] if isinstance(x, str) else "",
)
def test_a_mistake_is_answered_in_one_sentence(arguments, sentence, tmp_path):
    run = train_net(*arguments, datasets=tmp_path, check=False)
    assert run.returncode != 0
    assert sentence in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
