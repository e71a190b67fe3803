"""``tools/train_classifier.py``: learns, resumes exactly, starts detectors and timm's models."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS, ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from sasa_det.classification import (
    PIXEL_MEAN,
    PIXEL_STD,
    Classifier,
    ClassifierRecipe,
    ClassifierTrainer,
    average_weights,
    check_resume,
)
from sasa_det.config import load_config
from sasa_det.data.classification import TrainingBatches, load_images
from sasa_det.distributed import TERMINATED

# The backbone of configs/demo.yaml.
RECIPE = ClassifierRecipe(
    **{"depth": 26, "width": 16, "num_heads": 4, "kernel_size": 5, "image_size": 32},
    **{"min_crop": 0.6, "epochs": 8, "warmup_epochs": 1, "batch_size": 30, "lr": 0.02},
)
CLASSES = ["0", "1", "4", "7"]
OPTIONS = "--depth 26 --width 16 --num-heads 4 --kernel-size 5 --image-size 32 --min-crop 0.6"
OPTIONS += " --epochs 8 --warmup-epochs 1 --batch-size 30 --lr 0.02"


def start(*arguments):
    command = [sys.executable, "tools/train_classifier.py", *map(str, arguments)]
    return subprocess.Popen(
        command,
        **{"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True},
        start_new_session=True,
    )


def train(*arguments):
    run = run_tool("tools/train_classifier.py", *arguments)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Handwritten digits of four kinds, as ImageNet lies on disk."""
    root = tmp_path_factory.mktemp("data") / "digits"
    digits = load_digits()
    for split, first, number in (("train", 0, 60), ("val", 100, 40)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            samples = digits.images[digits.target == int(name)][first : first + number]
            for index, sample in enumerate(samples):
                picture = Image.fromarray((sample * 255 / 16).astype(np.uint8)).convert("RGB")
                picture.resize((40, 40)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train("--data", pictures, "--output", folder, "--workers", 0, *OPTIONS.split())
    return folder


def load(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)


def test_it_learns_and_writes_its_figures(trained):
    (results,) = json.loads((trained / "evaluation.json").read_text()).items()
    name, figures = results
    assert name == "digits_val"
    assert 60 < figures["classification"]["top1"] <= figures["classification"]["top5"] == 100
    recipe = json.loads(json.dumps(asdict(RECIPE)))
    assert figures["model"] == {**recipe, "num_classes": 4, "epochs_trained": 8}
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    assert last["classification/top1"] == figures["classification"]["top1"]
    assert 0 < last["lr"] < 1e-4  # the end of the cosine
    assert last["total_loss"] < 1.2


def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(trained, pictures, tmp_path):
    command = ["--data", pictures, "--output", tmp_path, *OPTIONS.split(), "--resume"]
    tag = tmp_path / "last_checkpoint"
    for number, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, TERMINATED)):
        before = tag.read_text() if tag.exists() else ""
        run = start(*command, "--workers", 1)
        while not tag.exists() or tag.read_text() == before:
            assert run.poll() is None, run.stdout.read()[-3000:]
            time.sleep(0.05)
        os.killpg(run.pid, number)  # those that load images, too, as schedulers do
        said, _ = run.communicate()
        assert run.returncode == status, said[-3000:]
    assert not (tmp_path / "model_final.pth").exists()
    output = train(*command, "--workers", 2)
    assert "Starting training from iteration 0" not in output
    resumed, wanted = flat(load(tmp_path)), flat(load(trained))
    assert resumed.keys() == wanted.keys()
    different = [name for name in wanted if not equal(resumed[name], wanted[name])]
    assert not different
    figures = [(folder / "evaluation.json").read_text() for folder in (tmp_path, trained)]
    assert figures[0] == figures[1]


def flat(tree, prefix=""):
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key in tree for k, v in flat(tree[key], f"{prefix}.{key}").items()}


def equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_detector_starts_from_it_and_sees_the_same(trained, tmp_path):
    cfg = load_config(str(CONFIGS / "demo.yaml"))
    detector = build_model(cfg).eval()
    backbone = detector.backbone.bottom_up
    path = str(trained / "model_final.pth")
    DetectionCheckpointer(detector).resume_or_load(path, resume=False)
    weights = load(trained)["model"]
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, weights.pop(name)), name
    assert set(weights) == {"linear.weight", "linear.bias"}

    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)  # RGB; detectors are given BGR
    seen = detector.preprocess_image([{"image": picture.flip(0)}]).tensor
    classifier = classifier_of(trained)
    inputs = []
    classifier.backbone.stem.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        classifier((picture[None], torch.zeros(1, dtype=torch.long)))
        features = backbone(seen)["res5"].mean(dim=(2, 3))
        logits = classifier.backbone.linear(features)
        wanted = classifier((picture[None], torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(inputs[0], seen)
    torch.testing.assert_close(logits, wanted)


def classifier_of(folder):
    resnet = RECIPE.build_resnet(len(CLASSES))
    resnet.load_state_dict(load(folder)["model"])
    return Classifier(resnet).eval()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_its_pixels_are_those_of_every_config(path):
    cfg = load_config(str(path))
    assert cfg.INPUT.FORMAT == "BGR"
    assert tuple(cfg.MODEL.PIXEL_MEAN) == PIXEL_MEAN
    assert tuple(cfg.MODEL.PIXEL_STD) == PIXEL_STD


def test_timm_builds_the_models_and_loads_the_checkpoint(trained):
    timm = pytest.importorskip("timm")
    import sasa_det.timm_models  # noqa: F401

    assert len(timm.list_models("sasa_resnet*")) == 6
    narrow = {"stem_channels": 16, "bottleneck_channels": 16, "res2_channels": 64}
    model = timm.create_model(
        "sasa_resnet26",
        **{"num_classes": 4, "kernel_size": 5, "num_heads": 4, **narrow},
        checkpoint_path=trained / "model_final.pth",
    ).eval()
    picture = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    settings = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = model((picture / 255 - mean) / std)
        wanted = classifier_of(trained)((picture, torch.zeros(1, dtype=torch.long)))
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, model.num_features)
    assert "res2.0.attention.rel_rows" in model.no_weight_decay()


@pytest.mark.parametrize("option", ["drop_path_rate", "img_size", "output_stride"])
def test_an_option_of_timm_that_the_models_lack_is_refused_with_those_they_have(option):
    timm = pytest.importorskip("timm")
    import sasa_det.timm_models  # noqa: F401

    with pytest.raises(ValueError, match=rf"^SASAResNet has no {option}; what it takes: .*depth, "):
        timm.create_model("sasa_resnet26", **{option: 16})


def test_the_average_forgets_the_start_and_includes_the_statistics():
    norm = torch.nn.BatchNorm2d(2)
    average = average_weights(norm, decay=0.9999)
    for step in range(100):
        norm.running_mean.fill_(step)
        torch.nn.init.constant_(norm.weight, step)
        average.update_parameters(norm)
    assert 80 < average.module.running_mean[0] < 99
    torch.testing.assert_close(average.module.weight, average.module.running_mean)


def test_the_papers_recipe_is_the_default_and_the_learning_rate_scales_with_the_batch():
    recipe = ClassifierRecipe()
    assert (recipe.epochs, recipe.batch_size, recipe.base_lr()) == (130, 4096, 1.6)
    assert replace(recipe, batch_size=256).base_lr() == pytest.approx(0.1)
    assert replace(recipe, batch_size=256, lr=0.3).base_lr() == 0.3


def test_mixed_precision_is_near_to_float32(pictures):
    batch = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.arange(4)
    model = Classifier(RECIPE.build_resnet(4))
    loss = model(batch)["loss_cls"]
    model.mixed_precision = True
    mixed = model(batch)["loss_cls"]
    assert mixed.dtype == torch.float32
    assert mixed != loss
    torch.testing.assert_close(mixed, loss, rtol=0.05, atol=0.05)


TWO_PROCESSES = """
import json
import sys
import torch
import torch.multiprocessing as mp
import sasa_det
from detectron2.utils import comm
sys.path.insert(0, "tests")
from test_classifier import RECIPE, ClassifierTrainer, TrainingBatches, replace

def run(rank, folder, pictures):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    batches = comm.gather(list(TrainingBatches(25, 10, 1, 6)))
    if rank == 0:
        open(f"{folder}/batches.json", "w").write(json.dumps(batches))
    torch.manual_seed(rank)  # the first process's weights are to be taken
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    trainer = ClassifierTrainer(recipe, pictures, folder, num_workers=0)
    trainer.run()
    weights = [p.detach() for p in trainer.classifier.parameters()]
    weights += [x.detach() for x in trainer.average.module.parameters()]
    for values in zip(*comm.all_gather(weights)):
        assert torch.equal(*values)

if __name__ == "__main__":
    mp.start_processes(run, sys.argv[1:], nprocs=2, start_method="fork")
"""


def test_two_processes_share_the_batches_the_weights_and_the_evaluation(pictures, tmp_path):
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(pictures)],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    shared = json.loads((tmp_path / "batches.json").read_text())
    for whole, *parts in zip(TrainingBatches(25, 10, 1, 6), *shared):
        assert len(parts[0]) == len(parts[1]) == 5
        assert sorted(map(tuple, parts[0] + parts[1])) == sorted(whole)
    figures = (tmp_path / "evaluation.json").read_text()
    # The training is finished: resuming it, alone, evaluates its last checkpoint.
    recipe = replace(RECIPE, epochs=1, warmup_epochs=0)
    again = ClassifierTrainer(recipe, str(pictures), str(tmp_path), num_workers=0)
    again.run(resume=True)
    assert (tmp_path / "evaluation.json").read_text() == figures


def test_batches_cover_an_epoch_once_and_continue_alike_from_any_step():
    batches = list(TrainingBatches(25, 10, 0, 6))
    first, second = ({i for batch in batches[k : k + 2] for i, _ in batch} for k in (0, 2))
    assert len(first) == len(second) == 20  # no image twice in an epoch
    assert first != second
    assert len({seed for batch in batches for _, seed in batch}) == 60
    assert list(TrainingBatches(25, 10, 3, 6)) == batches[3:]


def test_the_batches_of_another_seed_have_nothing_in_common_with_these():
    ours, theirs = (list(TrainingBatches(25, 10, 0, 40, seed)) for seed in (0, 1))
    seeds = [{seed for batch in batches for _, seed in batch} for batches in (ours, theirs)]
    assert seeds[0].isdisjoint(seeds[1])
    orders = {tuple(i for i, _ in batch) for batch in ours + theirs}
    assert len(orders) == 80


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_ends_the_training_in_a_sentence_with_its_name(
    workers, pictures, tmp_path
):
    broken = tmp_path / "train" / "0" / "broken.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    (tmp_path / "val").symlink_to(pictures / "val")
    for name in CLASSES[1:]:
        (tmp_path / "train" / name).symlink_to(pictures / "train" / name)
    options = [*OPTIONS.split(), "--epochs", 1, "--warmup-epochs", 0, "--batch-size", 181]
    options += ["--output", tmp_path / "out", "--workers", workers]
    run = run_tool("tools/train_classifier.py", "--data", tmp_path, *options)
    assert run.returncode == 1
    sentence = f"error: The image '{broken}' cannot be used: cannot identify image file"
    assert run.stderr.splitlines()[-1].startswith(sentence)


def test_a_diverged_training_ends_in_a_sentence_with_step_and_loss(pictures, tmp_path):
    options = [*OPTIONS.split(), "--lr", "1e30", "--output", tmp_path, "--workers", 0]
    run = run_tool("tools/train_classifier.py", "--data", pictures, *options)
    assert run.returncode == 1
    sentence = run.stderr.splitlines()[-1]
    assert "at iteration=" in sentence
    assert "loss_cls" in sentence
    assert sentence.endswith("; start anew with a lower --lr.")


def test_labels_are_the_trainings_where_validation_lacks_a_class(pictures, tmp_path):
    (tmp_path / "train").symlink_to(pictures / "train")
    (tmp_path / "val" / "1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"val' has no images"):
        load_images(str(tmp_path), "folder")
    (tmp_path / "val" / "7").symlink_to(pictures / "val" / "7")
    train_images, val_images = load_images(str(tmp_path), "folder")
    assert train_images.classes == CLASSES
    assert {label for _, label in val_images} == {3}
    (tmp_path / "val" / "9").symlink_to(pictures / "val" / "7")
    with pytest.raises(ValueError, match=r"The class '9' of .*val has no folder in .*train"):
        load_images(str(tmp_path), "folder")


def test_a_checkpoint_of_another_run_is_named_with_the_first_differences(trained):
    other = replace(RECIPE, depth=50, width=64, lr=0.1, seed=3)
    named = "depth is 26, not 50, width is 16, not 64, lr is 0.02, not 0.1; resume with"
    with pytest.raises(ValueError, match=named):
        check_resume(str(trained), other, CLASSES)
    with pytest.raises(ValueError, match=r"classes is \['0', '1', '4', '7'\], not \['a'\]"):
        check_resume(str(trained), RECIPE, ["a"])
    check_resume(str(trained), RECIPE, CLASSES)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "error: 'nowhere/train' has no folders of images; --data must"),
        (["--batch-size", "500"], "--batch-size 500 is more than the 240 training images"),
        (["--num-heads", "5", "--batch-size", "30"], "num_heads"),
        (["--depth", "34", "--batch-size", "30"], "must be one of 26, 38, 50, 101, 152, but is 34"),
        (["--epochs", "0"], "--epochs: must be 1 or more, but is 0"),
        (["--num-gpus", "99"], "--num-gpus is 99, but this machine has"),
        (["--output", "{trained}", "--resume", "--batch-size", "30"], "depth is 26, not 50, k"),
        (["--output", "{trained}/metrics.json"], "metrics.json' is a file; name a folder."),
        (["--seed", "-1"], "error: --seed must be from 0 to 4294967295, but is -1."),
        (["--workers", "-1"], "--workers must be 0 or more, but is -1."),
        (["--min-crop", "1.5"], "--min-crop must be above 0 and not above 1, but is 1.5."),
        (["--min-crop", "0"], "--min-crop must be above 0 and not above 1, but is 0.0."),
        (["--lr", "nan"], "--lr must be a number above 0, but is nan."),
        (["--momentum", "-1"], "--momentum must be from 0 to below 1, but is -1.0."),
        (["--weight-decay", "-1"], "--weight-decay must be a number from 0, but is -1.0."),
        (["--label-smoothing", "2"], "--label-smoothing must be from 0 to 1, but is 2.0."),
        (["--ema-decay", "2"], "--ema-decay must be from 0 to 1, but is 2.0."),
    ],
    ids=lambda x: " ".join(x[:2]) if isinstance(x, list) else "",
)
def test_a_mistake_is_answered_in_one_sentence(
    arguments, sentence, pictures, trained, monkeypatch, capsys
):
    arguments = [argument.format(trained=trained) for argument in arguments]
    tool = str(ROOT / "tools" / "train_classifier.py")
    monkeypatch.setattr(sys, "argv", [tool, "--data", str(pictures), *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(tool, run_name="__main__")
    code = exit_info.value.code
    answer = code if isinstance(code, str) else capsys.readouterr().err
    assert sentence in answer.splitlines()[-1]
