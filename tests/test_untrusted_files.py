"""Files from strangers: whatever they hold, nothing in them is executed or written elsewhere."""

import argparse
import json
import os
import pickle
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS, ROOT
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from torch import nn
from torchvision.datasets import CIFAR10

from sasa_det.checkpoint import check_weights
from sasa_det.classification import ClassifierRecipe, check_resume
from sasa_det.config import load_config
from sasa_det.data import check_config_datasets
from sasa_det.data.classification import load_images
from sasa_det.data.digits import generate_digits
from sasa_det.engine import Trainer
from sasa_det.weight_files import (
    TRUST_VARIABLE,
    RefusedWeightsError,
    SafeCheckpointer,
    read_weights,
    write_weights,
)

DEMO = ["--config", "configs/demo.yaml"]
SUFFIXES = [".pth", ".pkl", ".pyth", ".old.pth"]


class Harm:
    """What a pickle executes when it is loaded: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write(content, path):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=".old" not in path.name)
    return str(path)


@pytest.fixture
def harm(tmp_path):
    """Where the malicious files of a test would make a folder."""
    yield tmp_path / "harm"
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_malicious_files_of_these_tests_are_malicious(suffix, tmp_path):
    path = write({"model": Harm(tmp_path / "harm")}, tmp_path / f"weights{suffix}")
    with open(path, "rb") as file:
        if suffix == ".pkl":
            pickle.load(file)
        else:
            torch.load(file, weights_only=False)
    assert (tmp_path / "harm").is_dir()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_weights_that_would_execute_something_are_refused_by_name(suffix, harm, tmp_path):
    path = write({"model": {"weight": Harm(harm)}}, tmp_path / f"weights{suffix}")
    sentence = f"{re.escape(path)}' is refused: it asks for posix.mkdir.*set {TRUST_VARIABLE}=1"
    with pytest.raises(RefusedWeightsError, match=sentence):
        SafeCheckpointer(nn.Linear(1, 1)).load(path)
    with pytest.raises(RefusedWeightsError, match=sentence):
        check_weights(path, load_config(str(CONFIGS / "demo.yaml")))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_who_trusts_a_file_loads_it(suffix, tmp_path, monkeypatch):
    content = {"model": nn.Linear(1, 1).state_dict(), "args": argparse.Namespace(lr=1)}
    if suffix == ".pkl":
        content = {"model": {"weight": np.ones((1, 1))}, "__author__": Harm(tmp_path / "trusted")}
    if suffix == ".pyth":
        content["model_state"] = content["model"]
    path = write(content, tmp_path / f"weights{suffix}")
    with pytest.raises(RefusedWeightsError):
        SafeCheckpointer(nn.Linear(1, 1)).load(path)
    monkeypatch.setenv(TRUST_VARIABLE, "1")
    SafeCheckpointer(nn.Linear(1, 1)).load(path)
    assert (tmp_path / "trusted").is_dir() == (suffix == ".pkl")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_arrays_and_tensors_need_no_trust(suffix, tmp_path):
    wanted = nn.Linear(3, 2)
    weights = {name: x.numpy() for name, x in wanted.state_dict().items()}
    names = {".pkl": {"model": weights, "__author__": "me"}, ".pyth": {"model_state": weights}}
    content = names.get(suffix, {"model": weights, "iteration": np.float64(3)})
    loaded = nn.Linear(3, 2)
    SafeCheckpointer(loaded).load(write(content, tmp_path / f"weights{suffix}"))
    assert torch.equal(loaded.weight, wanted.weight)


@pytest.mark.parametrize("name", ["a.pth", "a.pkl", "a.pyth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"\x80\x02}q\x00"])
def test_what_is_no_checkpoint_is_named(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RefusedWeightsError, match=rf"{name}' (cannot be read|is refused): \w+"):
        SafeCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(
    "content",
    [
        *([1], 3, None, np.ones(1), {"state_dict": {"weight": np.ones((1, 1))}}),
        *({"model": x} for x in ([1], None, 3, {}, {"a": 1})),
    ],
    ids=str,
)
def test_weights_that_are_no_model_are_named_before_and_when_they_are_loaded(
    suffix, content, tmp_path
):
    path = write(content, tmp_path / f"a{suffix}")
    sentence = re.escape(path) + "' holds (a |no state of a detectron2 model; ResNets of other)"
    with pytest.raises(RefusedWeightsError, match=sentence):
        SafeCheckpointer(nn.Linear(1, 1)).load(path)
    if suffix == ".pth" or not isinstance(content, dict):
        with pytest.raises(RefusedWeightsError, match=sentence):
            check_weights(path, load_config(str(CONFIGS / "demo.yaml")))


def tool(*arguments):
    run = run_tool(*arguments)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    return run.stderr.splitlines()[-1]


def test_training_refuses_such_weights_and_such_a_checkpoint_to_resume_from(harm, tmp_path):
    path = write({"model": Harm(harm)}, tmp_path / "weights.pkl")
    sentence = tool("tools/train_net.py", *DEMO, "MODEL.WEIGHTS", path)
    assert sentence.startswith(f"error: The file '{path}' is refused: it asks for posix.mkdir")
    path = write({"model": Harm(harm)}, tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    sentence = tool("tools/train_net.py", *DEMO, "--resume", "OUTPUT_DIR", tmp_path)
    assert sentence.startswith(f"error: The file '{path}' is refused: it asks for posix.mkdir")


def test_a_classifiers_training_refuses_to_resume_from_one(harm, tmp_path):
    path = write({"classifier": {}, "model": Harm(harm)}, tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(RefusedWeightsError, match=re.escape(path)):
        check_resume(str(tmp_path), ClassifierRecipe(), ["a", "b"])


def test_extracting_weights_refuses_such_a_checkpoint(harm, tmp_path):
    path = write({"model": Harm(harm)}, tmp_path / "model.pth")
    sentence = tool("tools/extract_weights.py", path, tmp_path / "weights.safetensors")
    assert sentence.startswith(f"error: The file '{path}' is refused")
    assert not (tmp_path / "weights.safetensors").exists()


def test_proposals_that_would_execute_something_are_refused(harm, tmp_path):
    path = write({"boxes": Harm(harm)}, tmp_path / "proposals.pkl")
    keys = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", f"('{path}',)"]
    with pytest.raises(RefusedWeightsError, match=r"proposals.pkl' is refused"):
        check_config_datasets(load_config(str(CONFIGS / "demo.yaml"), keys), training=True)


def test_nothing_else_of_ours_unpickles():
    """One module loads weights; what others write, tests and docs aside, goes through it."""
    unsafe = r"torch\.load\(|pickle\.loads?\(|[^\w.]DetectionCheckpointer|yaml\.(unsafe_)?load\("
    unsafe += r"|np\.load\(|allow_unsafe=True|joblib|LazyConfig"
    sources = [*ROOT.glob("sasa_det/**/*.py"), *ROOT.glob("tools/*.py")]
    found = {path.name for path in sources if re.search(unsafe, path.read_text())}
    assert found == {"weight_files.py"}


# .safetensors.


def test_extracted_weights_are_the_models(tmp_path):
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / "demo.yaml"))
    model = build_model(cfg).to(memory_format=torch.channels_last)
    torch.save({"model": model.state_dict(), "trainer": {"optimizer": {}}}, tmp_path / "a.pth")
    path = tmp_path / "weights.safetensors"
    run = run_tool("tools/extract_weights.py", tmp_path / "a.pth", path)
    assert run.returncode == 0, run.stderr
    assert re.search(r"\d+ tensors with [\d,]+ numbers, for MODEL.WEIGHTS: .*weights", run.stdout)
    check_weights(str(path), cfg)
    torch.manual_seed(1)
    loaded = build_model(cfg)
    SafeCheckpointer(loaded).load(str(path))
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_safetensors_of_another_backbone_are_refused(tmp_path):
    path = str(tmp_path / "a.safetensors")
    write_weights({"backbone.bottom_up.res2.0.conv1.weight": torch.ones(2, 2, 1, 1)}, path)
    with pytest.raises(ValueError, match=r"res2.0.conv1.weight is 2x2x1x1 there and 16x16x1x1 in"):
        check_weights(path, load_config(str(CONFIGS / "demo.yaml")))


def test_names_that_need_matching_say_so_in_either_format(tmp_path):
    cfg = load_config(str(CONFIGS / "demo.yaml"))
    name = "res2.0.conv1.weight"
    for suffix in (".pth", ".safetensors"):
        path = str(tmp_path / f"a{suffix}")
        write_weights({name: torch.full((16, 16, 1, 1), 7.0)}, path, matching_heuristics=True)
        model = build_model(cfg)
        SafeCheckpointer(model).load(path)
        assert (model.backbone.bottom_up.res2[0].conv1.weight == 7).all()


def test_weights_are_written_to_files_that_can_be_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"a .pth or .safetensors file.*but the name is 'a.pkl'"):
        write_weights({}, "a.pkl")
    torch.save({"model": {}}, tmp_path / "none.pth")
    sentence = tool("tools/extract_weights.py", tmp_path / "none.pth", tmp_path / "b.pth")
    assert "none.pth' holds no state of a detectron2 model" in sentence
    sentence = tool("tools/extract_weights.py", tmp_path / "none.pth", tmp_path / "none.pth")
    assert "none.pth' is one of the files that are read" in sentence
    sentence = tool("tools/extract_weights.py", tmp_path / "none.pth", tmp_path / "none.pth/b.pth")
    assert f"The output folder '{tmp_path}/none.pth' cannot be written: File exists" in sentence
    assert read_weights(str(tmp_path / "none.pth")) == {"model": {}}


# Datasets and archives.


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere")


def test_a_tampered_cifar_10_is_neither_unpickled_nor_unpacked(no_download, harm, tmp_path):
    root = tmp_path / "cifar"
    (root / "cifar-10-batches-py").mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (root / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Harm(harm)))
    with tarfile.open(root / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(__file__, arcname="../harm")
    with pytest.raises(FileNotFoundError, match="CIFAR-10 is not in"):
        load_images(str(root), "cifar10")


def test_file_names_of_a_dataset_do_not_decide_where_anything_is_written(tmp_path):
    datasets = tmp_path / "datasets"
    generate_digits(datasets, "train", 4, 0)
    content = json.loads((datasets / "train.json").read_text())
    (tmp_path / "elsewhere").mkdir()
    for image in content["images"]:
        shutil.move(datasets / "train" / image["file_name"], tmp_path / "elsewhere")
        image["file_name"] = f"../../elsewhere/{image['file_name']}"
    (datasets / "train.json").write_text(json.dumps(content))
    register_coco_instances("elsewhere", {}, f"{datasets}/train.json", f"{datasets}/train")
    before = set(tmp_path.rglob("*"))
    output = tmp_path / "output"
    keys = ["DATASETS.TRAIN", "('elsewhere',)", "DATASETS.TEST", "('elsewhere',)"]
    keys += ["SOLVER.MAX_ITER", "1", "SOLVER.WARMUP_ITERS", "0", "OUTPUT_DIR", str(output)]
    cfg = load_config(str(CONFIGS / "demo.yaml"), keys)
    (warning, *_) = check_config_datasets(cfg, training=True)
    assert "elsewhere" in warning
    output.mkdir()
    Trainer(cfg).train()
    written = set(tmp_path.rglob("*")) - before
    assert output / "model_final.pth" in written
    assert all(path == output or output in path.parents for path in written)
