"""Projects that are not this one: their own train_net.py, their own configs, YAML or Python."""

import re
import shutil

import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from commands import ROOT, run_tool
from conftest import CONFIGS
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import build_model
from test_detectors import SMALL

from sasa_det.config import load_config, own_defaults
from sasa_det.layers import LocalSelfAttention2d

SMALL_LAZY = [
    *("train.device=cpu", "model.backbone.bottom_up.depth=26", "model.backbone.out_channels=64"),
    *("model.backbone.bottom_up.stem_channels=16", "model.backbone.bottom_up.res2_channels=32"),
    *("model.backbone.bottom_up.bottleneck_channels=16", "model.head.conv_dims=[64]"),
    *("dataloader.train.total_batch_size=2", "dataloader.train.num_workers=0"),
    *(f"dataloader.train.mapper.augmentations.0.target_{x}=64" for x in ("height", "width")),
    *("dataloader.train.mapper.augmentations.1.crop_size=[64,64]", "dataloader.test.num_workers=0"),
    *(f"dataloader.test.mapper.augmentations.0.{x}=64" for x in ("short_edge_length", "max_size")),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The example's folder, somewhere else, with the LazyConfig beside it."""
    folder = tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(ROOT / "docs" / "outside_project", folder)
    shutil.copy(ROOT / "configs" / "lazy" / "retinanet_attn.py", folder)
    return folder


@pytest.fixture
def run(project, eight_coco_images):
    def run(*arguments):
        datasets = {"DETECTRON2_DATASETS": str(eight_coco_images)}
        result = run_tool(*arguments, folder=project, environment=datasets)
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
        return result.stdout + result.stderr

    return run


def test_a_mask_rcnn_of_another_project_trains_and_evaluates(run, project):
    small = {name: value for name, value in SMALL.items() if "NUM_CLASSES" not in name}
    output = run(
        *("train_net.py", "--config-file", "mask_rcnn.yaml", "OUTPUT_DIR", "output"),
        *(x for pair in small.items() for x in pair),
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", 96, "SOLVER.IMS_PER_BATCH", 2),
        *("SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "(1,)", "DATALOADER.NUM_WORKERS", 0),
    )
    assert output.count("copypaste: AP,AP50,AP75,APs,APm,APl") == 2  # boxes and masks
    names = torch.load(project / "output" / "model_final.pth", weights_only=True)["model"]
    assert any(name.endswith("attention.rel_rows") for name in names)


def test_the_lazy_config_is_the_yaml_config():
    lazy = LazyConfig.load(str(CONFIGS / "lazy" / "retinanet_attn.py"))
    cfg = load_config(str(CONFIGS / "retinanet_full_attn_fpn.yaml"), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        models = [instantiate(lazy.model), build_model(cfg)]
    shapes = [{name: x.shape for name, x in m.state_dict().items()} for m in models]
    assert shapes[0] == shapes[1]
    numbers = [
        {name: x for name, x in vars(m).items() if isinstance(x, int | float | str)} for m in models
    ]
    differing = {name for name in numbers[0] if numbers[0][name] != numbers[1][name]}
    assert differing <= {"vis_period"}
    assert lazy.dataloader.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert lazy.optimizer.lr == cfg.SOLVER.BASE_LR
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    assert lazy.lr_multiplier.warmup_length * lazy.train.max_iter == cfg.SOLVER.WARMUP_ITERS


def test_a_lazy_config_trains_resumes_and_evaluates(run, project):
    command = ["lazyconfig_train_net.py", "--config-file", "retinanet_attn.py"]
    small = [*SMALL_LAZY, "train.output_dir=lazy"]
    run(*command, *small, "train.max_iter=2")
    output = run(*command, "--resume", *small, "train.max_iter=3")
    assert "Starting training from iteration 2" in output
    weights = project / "lazy" / "model_final.pth"
    checkpoint = torch.load(weights, weights_only=True)
    assert checkpoint["iteration"] == 2
    assert any(name.startswith("head.cls_subnet.0.attention") for name in checkpoint["model"])
    groups = checkpoint["trainer"]["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 1e-4}
    output = run(*command, "--eval-only", *small, f"train.init_checkpoint={weights}")
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in output


def test_the_guide_names_every_key_that_only_our_trainer_reads():
    guide = (ROOT / "docs" / "detectors.md").read_text()
    keys = [key for key in own_defaults() if not key.startswith("MODEL")]
    assert len(keys) == 7
    assert [key for key in keys if f"`{key}`" not in guide] == []


def test_what_the_guide_says_in_python_and_yaml_is_so(project, tmp_path):
    guide = (ROOT / "docs" / "detectors.md").read_text()
    backbone_yaml, scratch_yaml = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(block.replace("docs/outside_project", str(project)), names)
    cfg = names["cfg"]
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    for number, block in enumerate([backbone_yaml, scratch_yaml]):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"{block}VERSION: 2\n")
        cfg.merge_from_file(str(path))
    cfg.merge_from_list([x for pair in SMALL.items() for x in pair])
    model = build_model(cfg)
    assert any(isinstance(m, LocalSelfAttention2d) for m in model.backbone.modules())
    optimizer = names["Trainer"].build_optimizer(cfg, model)
    embeddings = {id(p) for name, p in model.named_parameters() if name.endswith("rel_rows")}
    groups = [g for g in optimizer.param_groups if embeddings & {id(p) for p in g["params"]}]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert list(instantiate(names["backbone"]).output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
