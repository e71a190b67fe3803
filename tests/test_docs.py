"""Every command and example of the README and the docs runs, on small models and few pictures.

The pages are run as they are read, in one folder: later ones use what earlier ones wrote. It has
the project's tools, configs with fewer channels and steps, and some pictures of its own.
"""

import importlib
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from commands import ROOT, run_tool
from PIL import Image, ImageDraw

import sasa_det  # noqa: F401

# isort: split
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from sasa_det.data.digits import VARIANTS, generate_digits
from sasa_det.modeling import make_sasa_resnet

PAGES = ["README.md", "docs/reproduce.md", "docs/ablations.md", "docs/training.md"]
PAGES += ["docs/warm_start.md", "docs/operator.md", "docs/benchmark.md", "docs/learning.md"]
PAGES += ["docs/dataset.md", "docs/detectors.md", "docs/seeing.md", "docs/scale.md"]
PAGES += ["docs/deployment.md", "docs/interruptions.md", "docs/robustness.md"]
PAGES += ["docs/benchmark_gpu.md"]

SMALL_MODEL = {
    "DEVICE": "cpu",
    "RESNETS": {
        **{"DEPTH": 26, "NORM": "BN", "STEM_OUT_CHANNELS": 16},
        **{"WIDTH_PER_GROUP": 16, "RES2_OUT_CHANNELS": 64},
    },
    "FPN": {"OUT_CHANNELS": 64},
    "RETINANET": {"NUM_CONVS": 1},
    "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 16},
    "ROI_BOX_HEAD": {"CONV_DIM": 32, "FC_DIM": 32},
    "ROI_MASK_HEAD": {"CONV_DIM": 32},
    "SASA": {"NUM_HEADS": 2},
}
SHORT_RUN = {"IMS_PER_BATCH": 2, "MAX_ITER": 2, "WARMUP_ITERS": 1}
SMALL_IMAGES = {"MIN_SIZE_TRAIN": (64,), "MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 64}
# What a command is told besides, where the config cannot make it small.
SHORTER = {
    "tools/benchmark.py": "--suite layer --channels 16 --heads 2 --size 8 --rounds 1"
    " --without-peers",
    "tools/run_table2.py": "--rows retinanet_conv --timed-steps 5",
    # At the recipe's rate, batch norm of maps of one position makes so few images diverge.
    "tools/train_classifier.py": "--depth 26 --width 16 --num-heads 2 --image-size 32 --epochs 1"
    " --warmup-epochs 0 --batch-size 4 --lr 1e-6",
    "tools/convert_resnet.py": "--steps 2 --batch-size 2",
    "docs/outside_project/train_net.py": "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 26"
    " INPUT.MIN_SIZE_TRAIN (64,) INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2"
    " SOLVER.STEPS (1,) DATALOADER.NUM_WORKERS 0",
    "docs/outside_project/lazyconfig_train_net.py": "train.device=cpu train.max_iter=2"
    " model.backbone.bottom_up.depth=26 dataloader.train.total_batch_size=2"
    " dataloader.train.num_workers=0 dataloader.test.num_workers=0"
    " dataloader.train.mapper.augmentations.0.target_height=64"
    " dataloader.train.mapper.augmentations.0.target_width=64"
    " dataloader.train.mapper.augmentations.1.crop_size=[64,64]"
    " dataloader.test.mapper.augmentations.0.short_edge_length=64",
}
# What follows these is replaced: this machine may have no GPUs, and steps are many.
REPLACED = {
    "--num-gpus": "1",
    "--jobs": "1",
    "--batch": "1",
    "--device": "cpu",
    "--dtype": "float32",
}
REPLACED |= {"SOLVER.MAX_ITER": "2", "SOLVER.WARMUP_ITERS": "1"}
REPLACED |= {"--num-machines": "1", "--nnodes": "1", "--nproc-per-node": "2"}
# torch's bfloat16 convolutions on CPUs give NaN now and then where a map has one position.
REPLACED |= {"SOLVER.AMP.ENABLED": "False"}
REPLACED |= {"--rdzv-endpoint": "localhost:0", "SOLVER.ACCUMULATION_STEPS": "2"}
RECORDED = ["python", "torchrun", "make", "pip", "git"]
SLURM = """
srun() { "$@"; }
scontrol() { echo node0; }
SLURM_NNODES=2 SLURM_JOB_NODELIST="node[0-1]" SLURM_JOB_ID=1
"""
# Here, not run: environments are made where there is nothing yet, and these tests are one of them.
NOT_RUN = ["make", "pip", "git"]


def write_pictures(folder, number):
    """Pictures with a dark square on each, and their annotations in COCO's layout."""
    generator = np.random.default_rng(0)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir(parents=True)
        images, annotations = [], []
        for index in range(1, number + 1):
            picture = Image.fromarray(generator.integers(100, 255, (64, 64, 3), dtype=np.uint8))
            x, y = generator.integers(4, 28, 2).tolist()
            ImageDraw.Draw(picture).rectangle((x, y, x + 32, y + 32), fill=(20, 20, 20))
            picture.save(folder / split / f"{index:012}.jpg")
            images.append({"id": index, "file_name": f"{index:012}.jpg", "width": 64, "height": 64})
            corners = [x, y, x + 32, y, x + 32, y + 32, x, y + 32]
            annotations.append(
                {
                    **{"id": index, "image_id": index, "category_id": index, "iscrowd": 0},
                    **{"bbox": [x, y, 32, 32], "area": 1024, "segmentation": [corners]},
                }
            )
        categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))


def merge(into, changes):
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def write_small_configs(folder):
    folder.mkdir()
    (folder / "lazy").symlink_to(ROOT / "configs" / "lazy")
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        merge(config, {"SOLVER": SHORT_RUN})
        if "_BASE_" not in config:
            merge(config, {"MODEL": SMALL_MODEL, "INPUT": SMALL_IMAGES})
            merge(config, {"DATALOADER": {"NUM_WORKERS": 0}})
            config["INPUT"]["IMAGE_SIZE"] = 64 if "IMAGE_SIZE" in config["INPUT"] else 0
        (folder / path.name).write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the docs would be, with what the docs tell to bring along."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("sasa_det", "tools", "docs", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    write_small_configs(folder / "configs")
    write_pictures(folder / "datasets" / "coco", 4)
    for variant in VARIANTS:
        for split in ("train", "val"):
            generate_digits(folder / "datasets" / variant.name, split, 4, 0, variant)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            path = folder / "datasets" / "imagenet" / split / name
            path.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 40), (60 * index, 9, 9)).save(path / f"{index}.jpg")
    resnet = make_sasa_resnet(
        **{"depth": 26, "stem": "conv", "attention_stages": ()},
        **{"stem_channels": 16, "bottleneck_channels": 16, "res2_channels": 64},
    )
    torch.save(resnet.state_dict(), folder / "resnet50.pth")
    return folder


def code_blocks(page, language):
    text = (ROOT / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(page, folder):
    """The arguments of each command, as bash reads them."""
    record = folder / "record"
    record.write_text("")
    note = 'printf "%s\\0" "$@" >> record; echo >> record;'
    functions = [f'{name}() {{ set -- {name} "$@"; {note} }}' for name in RECORDED]
    script = "\n".join([*functions, "set -eu", SLURM, *code_blocks(page, "bash")])
    subprocess.run(["bash", "-c", script], cwd=folder, check=True)
    for line in record.read_text().split("\0\n")[:-1]:
        yield line.split("\0")


def adapted(arguments):
    """The arguments for a small model on a machine without GPUs."""
    for option, value in REPLACED.items():
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
    keys = next((i for i, x in enumerate(arguments) if "." in x and x.isupper()), len(arguments))
    return [*arguments[:keys], *SHORTER.get(arguments[0], "").split(), *arguments[keys:]]


# Minutes, for `make test-all`; what they run has tests of its own.
SLOW_PAGES = ["docs/deployment.md", "docs/scale.md", "docs/reproduce.md", "docs/ablations.md"]
RUN_PAGES = [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW_PAGES)) for x in PAGES]


@pytest.mark.parametrize("page", RUN_PAGES)
def test_every_command_of_the_page_runs(page, folder):
    environment = {"DETECTRON2_DATASETS": str(folder / "datasets"), "PYTHONPATH": str(ROOT)}
    for program, *arguments in commands(page, folder):
        if program in NOT_RUN:
            continue
        if arguments[0] == "tools/predict.py":
            pytest.importorskip("cv2", reason="detectron2 draws with OpenCV")
        module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
        run = run_tool(*module, *adapted(arguments), environment=environment, folder=folder)
        assert run.returncode == 0, f"{page}: {program} {arguments}\n{run.stderr[-3000:]}"


@pytest.mark.parametrize("page", RUN_PAGES)
def test_every_example_in_python_runs(page, folder):
    script = folder / "examples.py"
    script.write_text("\n".join(code_blocks(page, "python")))
    run = run_tool("examples.py", environment={"PYTHONPATH": str(ROOT)}, folder=folder)
    assert run.returncode == 0, f"{page}\n{run.stderr[-3000:]}"


def test_no_page_has_a_command_that_would_not_be_run():
    """Commands stand in blocks marked as bash; every page is among those that are run."""
    pages = {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")} | {"README.md"}
    assert pages == set(PAGES)
    for page in pages:
        text = Path(ROOT / page).read_text()
        assert not re.findall(r"^    (?:python|make|pip|torchrun|git) .*", text, flags=re.MULTILINE)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = (ROOT / page).read_text()
        for target in re.findall(r"\]\(([^)#]+)", text):
            if "://" not in target:
                assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_reference_has_every_public_name_with_its_docstring(folder):
    told = subprocess.run(
        ["make", "-n", "api", "-o", ".venv/.built"], cwd=ROOT, capture_output=True, text=True
    )
    command = told.stdout.replace("\\\n", " ").split()
    run = run_tool(*command[command.index("-m") :], folder=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    for package in ("ops", "layers", "modeling", "data", "analysis"):
        page = (folder / "output" / "api" / "sasa_det" / f"{package}.html").read_text()
        for name in importlib.import_module(f"sasa_det.{package}").__all__:
            section = page[page.index(f'<section id="{name}"') :].split("</section>")[0]
            assert 'class="docstring"' in section, f"sasa_det.{package}.{name}"
