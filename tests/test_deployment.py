"""Detectors outside this package: compiled, exported as programs, and in ONNX Runtime."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.ExifTags import Base
from sklearn.datasets import load_sample_image
from torch import nn
from torch.export import Dim

import sasa_det  # noqa: F401

# isort: split
from commands import ROOT, run_tool
from conftest import CONFIGS
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from sasa_det.config import load_config
from sasa_det.data import build_test_mapper
from sasa_det.deployment import export_onnx, export_program, network_of, open_onnx, run_onnx
from sasa_det.deployment.export import require
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import use_backend
from sasa_det.ops.decompositions import decompositions
from sasa_det.ops.registration import (
    local_attention_op,
    stem_attention_op,
    stem_attention_pooled_op,
)

DETECTORS = sorted(path.stem for path in CONFIGS.glob("retinanet_*.yaml"))
SMALL = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "26", "MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.FPN.OUT_CHANNELS", "64"),
    *("MODEL.RETINANET.NUM_CLASSES", "5", "MODEL.RETINANET.NUM_CONVS", "1"),
    *("MODEL.SASA.NUM_HEADS", "4", "INPUT.MIN_SIZE_TEST", "160", "INPUT.MAX_SIZE_TEST", "213"),
]


def small(config: str, *overrides: str) -> nn.Module:
    return build_model(load_config(str(CONFIGS / f"{config}.yaml"), [*SMALL, *overrides])).eval()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def attention_inputs(height, width, kernel_size, *, relative=True, heads=2, head_dim=4):
    maps = 3 * torch.randn(3, 2, heads * head_dim, height, width, dtype=torch.float64)
    embeddings = [None, None]
    if relative:
        embeddings = torch.randn(2, heads, kernel_size, head_dim // 2, dtype=torch.float64)
    return *maps, *embeddings, heads, kernel_size


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "kernel_size"),
    [(5, 6, 7), (17, 14, 5), (1, 1, 3), (16, 24, 7), (3, 30, 9), (6, 5, 1)],
)
def test_the_decomposed_attention_is_that_of_the_operator(height, width, kernel_size, relative):
    inputs = attention_inputs(height, width, kernel_size, relative=relative)
    decomposed = decompositions()[torch.ops.sasa_det.local_attention.default](*inputs)
    for actual, expected in zip(decomposed, local_attention_op(*inputs)):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_decomposed_a_key_outside_the_window_takes_no_part_however_well_it_fits():
    query, key, *others = attention_inputs(9, 13, 3)
    key[:, :, 4, 6] = 1e3 * query[:, :, 4, 9]
    expected = local_attention_op(query, key, *others)[0]
    decompose = decompositions()[torch.ops.sasa_det.local_attention.default]
    torch.testing.assert_close(decompose(query, key, *others)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 14), (3, 2)])
def test_the_decomposed_stem_is_that_of_the_operator(height, width, relative):
    heads, channels, mixtures, block = 2, 16, 3, 4
    shapes = [(2, 3, height, width), (channels, 3), (channels, 3), (mixtures, channels, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    tensors.append(torch.rand(mixtures, block, block, dtype=torch.float64).softmax(dim=0))
    embeddings = torch.randn(2, heads, 2 * block - 1, 4, dtype=torch.float64)
    inputs = (*tensors, *(embeddings if relative else (None, None)), heads)
    stem, pooled = torch.ops.sasa_det.stem_attention, torch.ops.sasa_det.stem_attention_pooled
    actual = [decompositions()[stem.default](*inputs), *decompositions()[pooled.default](*inputs)]
    for a, e in zip(actual, [stem_attention_op(*inputs), *stem_attention_pooled_op(*inputs)]):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_a_decomposed_program_takes_other_sizes_than_its_example():
    """The example has one block of queries; a program may have taken that for a constant."""
    layer = LocalSelfAttention2d(8, 8, kernel_size=5, num_heads=2).eval()
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    with torch.no_grad():
        example = (torch.randn(2, 8, 3, 4),)
        program = torch.export.export(layer, example, dynamic_shapes=sizes)
        program = program.run_decompositions(decompositions()).module()
        for n, height, width in ((1, 2, 3), (2, 4, 4), (1, 5, 9), (3, 17, 12)):
            x = torch.randn(n, 8, height, width)
            assert difference(program(x), layer(x)) < 1e-5


# Two levels are as good as five, and quicker.
TWO_LEVELS = [
    *(
        "MODEL.RESNETS.OUT_FEATURES",
        "['res4', 'res5']",
        "MODEL.FPN.IN_FEATURES",
        "['res4', 'res5']",
    ),
    *("MODEL.RETINANET.IN_FEATURES", "['p4', 'p5']"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[64, 90], [128, 181]]"),
]


@pytest.mark.parametrize(
    ("config", "training", "checkpointing"),
    [
        *((config, True, False) for config in DETECTORS),
        ("retinanet_full_attn_fpn", False, False),
        ("retinanet_full_attn_fpn", True, True),
    ],
)
def test_backbone_and_head_compile_without_graph_breaks(config, training, checkpointing):
    options = [*TWO_LEVELS, "MODEL.SASA.ACTIVATION_CHECKPOINTING", str(checkpointing)]
    # In float32 another order of summation can turn a ReLU over, and a gradient with it.
    model = small(config, *options).double().train(training)
    state = copy.deepcopy(model.state_dict())

    def network(images):
        features = model.backbone(images)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
        return [*logits, *deltas]

    torch._dynamo.reset()  # the same lines have been compiled for other detectors
    # The compiler's own backward, too, for the row that has everything.
    aot = training and config == "retinanet_full_attn_fpn"
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager" if aot else "eager")
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    results = []
    for function in (network, compiled):
        model.load_state_dict(state)
        with torch.set_grad_enabled(training):
            outputs = function(images)
        if training:
            total = sum(x.square().sum() for x in outputs)
            parameters = [p for n, p in model.named_parameters() if "top_block" not in n]
            outputs = [*outputs, *torch.autograd.grad(total, parameters)]
            outputs += [x.clone() for x in model.buffers()]  # batch norm has counted once
        results.append(outputs)
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def attention_detector() -> nn.Module:
    """A fully attentional RetinaNet that is sure of something: five levels, as the paper's."""
    torch.manual_seed(0)
    return decisive(small("retinanet_full_attn"))


def decisive(model: nn.Module) -> nn.Module:
    nn.init.normal_(model.head.cls_score[-1].weight, std=0.3)
    nn.init.normal_(model.head.bbox_pred[-1].weight, std=0.03)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def exported(attention_detector, tmp_path_factory) -> tuple[Path, str]:
    """The detector's ONNX file, made by the tool from a checkpoint, and what the tool printed."""
    folder = tmp_path_factory.mktemp("exported")
    torch.save({"model": attention_detector.state_dict()}, folder / "model.pth")
    run = export("retinanet_full_attn", folder / "model.onnx", folder / "model.pth")
    assert run.returncode == 0, run.stderr
    return folder / "model.onnx", run.stdout


def export(config, output, weights="", *options, overrides=(), **limits):
    arguments = ["--config", CONFIGS / f"{config}.yaml", "--output", output, *options]
    arguments += [*SMALL, *overrides, "MODEL.WEIGHTS", weights]
    return run_tool("tools/export_model.py", *arguments, **limits)


@pytest.mark.parametrize("size", [(1, 160, 213), (2, 256, 128), (3, 33, 70)])
def test_onnx_runtime_computes_what_eager_does(attention_detector, exported, size):
    session = open_onnx(exported[0])
    n, height, width = size
    images = torch.rand(n, 3, height, width) * 255
    network = network_of(attention_detector)
    # The file holds the eager path's operators; a random detector lets last bits grow.
    with torch.no_grad(), use_backend("eager"):
        wanted = network(images)
    for name, actual, expected in zip(network.output_names, run_onnx(session, images), wanted):
        assert actual.shape == expected.shape, name
        assert difference(actual, expected) < 1e-4, name


def test_an_onnx_file_is_made_of_standard_operators_that_grow_with_the_layers_not_the_windows(
    exported,
):
    import onnx

    model = onnx.load(exported[0])
    onnx.checker.check_model(model)
    nodes = model.graph.node
    assert {node.domain for node in [*nodes, *model.opset_import]} == {""}
    assert not model.functions
    # A stem, 8 blocks, and 2 subnets of 2 layers on 5 levels; windows have 49 positions.
    layers = 1 + 8 + 2 * 2 * 5
    assert sum(node.op_type == "Softmax" for node in nodes) == layers
    assert len(nodes) < 140 * layers


def test_the_tool_says_what_it_wrote_and_how_far_it_is_from_eager(exported):
    path, printed = exported
    assert f"{path}: {path.stat().st_size / 1e6:.1f} MB" in printed
    greatest = float(printed.split("Greatest difference from eager: ")[1].split()[0])
    assert 0 < greatest < 1e-4
    assert "÷ eager" in printed


def test_the_script_of_the_docs_detects_what_detectron2s_predictor_does(exported, tmp_path):
    path, _ = exported
    cfg = load_config(str(CONFIGS / "retinanet_full_attn.yaml"), SMALL).clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.DATASETS.TEST = str(path.with_suffix(".pth")), ()
    photograph = Image.fromarray(load_sample_image("china.jpg"))
    exif = photograph.getexif()
    exif[Base.Orientation] = 6  # as a camera held upright writes it
    photograph.save(tmp_path / "turned.png", exif=exif)
    expected = DefaultPredictor(cfg)(read_image(tmp_path / "turned.png", "BGR"))["instances"]
    assert len(expected) > 20

    script = script_of_the_docs(path)
    boxes, scores, classes = script["detect"](Image.open(tmp_path / "turned.png"))
    np.testing.assert_array_equal(classes, expected.pred_classes.numpy())
    # As a whole, as above: the layers of a random detector let the last bits of a score grow.
    assert difference(torch.from_numpy(scores), expected.scores) < 1e-4
    np.testing.assert_allclose(boxes, expected.pred_boxes.tensor.numpy(), atol=0.05)

    script["meta"] |= {"min_size": 600, "max_size": 700}  # the last two sizes come to halves
    for size in ([640, 480], [480, 640], [64, 64], [2000, 3], [325, 1000], [341, 440]):
        resize = ResizeShortestEdge(600, 700).get_transform(np.empty((*size[::-1], 3)))
        assert script["resized"](*size) == [resize.new_w, resize.new_h]
    script["meta"]["min_size"] = 0
    assert script["resized"](640, 480) == [640, 480]


def script_of_the_docs(path: Path) -> dict:
    script = (ROOT / "docs" / "deployment.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(script.replace("model.onnx", str(path)), names)
    return names


def test_a_detector_of_grey_pictures_in_their_own_size_is_exported(digits, tmp_path):
    keys = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[100.0]", "MODEL.PIXEL_STD", "[50.0]"]
    keys += [*TWO_LEVELS, "INPUT.MIN_SIZE_TEST", "0", "DATASETS.TEST", "()", "DATASETS.TRAIN", "()"]
    model = small("retinanet_conv", *keys)
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    path = tmp_path / "model.onnx"
    run = export("retinanet_conv", path, tmp_path / "model.pth", overrides=keys)
    assert run.returncode == 0, run.stderr
    for size in ("1x1x640x640", "1x1x480x641", "2x1x640x320", "\n640x640, "):
        assert size in run.stdout
    assert "The model has 5 classes, but the config's datasets name none" in run.stdout
    photograph = digits / "val" / "000001.jpg"
    cfg = load_config(str(CONFIGS / "retinanet_conv.yaml"), [*SMALL, *keys])
    with torch.no_grad():
        (found,) = model([build_test_mapper(cfg)({"file_name": str(photograph)})])
    boxes, scores, classes = script_of_the_docs(path)["detect"](Image.open(photograph))
    assert len(scores) > 5
    np.testing.assert_array_equal(classes, found["instances"].pred_classes.numpy())
    np.testing.assert_allclose(scores, found["instances"].scores.numpy(), rtol=1e-3)
    np.testing.assert_allclose(boxes, found["instances"].pred_boxes.tensor.numpy(), atol=0.05)


def test_a_failure_leaves_the_file_of_before(tmp_path):
    path, weights = tmp_path / "model.pt2", tmp_path / "model.pth"
    path.write_text("of before")
    model = small("retinanet_conv", *TWO_LEVELS)
    # Of the two outputs the second; the first stays a number.
    nn.init.constant_(model.head.cls_score.bias, float("nan"))
    torch.save({"model": model.state_dict()}, weights)
    for limits, sentence in (
        ({}, "differs from eager by nan, more than 0.0001; it is not kept."),
        ({"largest_file": 2**20}, f"{path}' cannot be written: [Errno 27] File too large"),
    ):
        options = ["--keep-operators"]
        run = export("retinanet_conv", path, weights, *options, overrides=TWO_LEVELS, **limits)
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1].startswith("error: ")
        assert run.stderr.splitlines()[-1].endswith(sentence)
        assert "Traceback" not in run.stderr
        assert path.read_text() == "of before"
        assert sorted(tmp_path.iterdir()) == [path, weights]


def test_overrides_may_follow_the_files_of_before(tmp_path, monkeypatch):
    words = ["--config", "a.yaml", "--output", "b.onnx", "--beside", "c.onnx", "MODEL.WEIGHTS", "d"]
    monkeypatch.setattr("sys.argv", ["export_model.py", *words])
    args = runpy.run_path(str(ROOT / "tools" / "export_model.py"))["parse_args"]()
    assert (args.beside, args.opts) == (["c.onnx"], ["MODEL.WEIGHTS", "d"])


@pytest.mark.slow
def test_the_convolutional_detector_runs_in_onnx_runtime_too(tmp_path):
    network = network_of(decisive_convolution())
    export_onnx(network, tmp_path / "conv.onnx", {})
    session = open_onnx(tmp_path / "conv.onnx")
    for size in ((1, 64, 96), (2, 33, 70)):
        images = torch.rand(size[0], 3, *size[1:]) * 255
        with torch.no_grad():
            wanted = network(images)
        for actual, expected in zip(run_onnx(session, images), wanted):
            assert difference(actual, expected) < 1e-4


def decisive_convolution() -> nn.Module:
    return small("retinanet_conv", *TWO_LEVELS)


TWO_STAGES = [
    *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"),
    *("MODEL.BACKBONE.NAME", "build_sasa_resnet_fpn_backbone"),
    *("MODEL.ANCHOR_GENERATOR.SIZES", "[[64], [128], [256]]"),
    *("MODEL.RPN.IN_FEATURES", "['p4', 'p5', 'p6']", "MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
    *("MODEL.ROI_HEADS.IN_FEATURES", "['p4', 'p5']", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "7"),
    *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"),
    *("MODEL.SASA.ATTENTION_STAGES", "['res5']"),
]


@pytest.mark.slow
def test_a_program_takes_images_of_any_size_above_the_coarsest_stride():
    network = network_of(small("retinanet_full_attn"))
    program = export_program(network).module()
    # P7 has 2 to 6 rows: one block of queries, or two.
    for size in ((1, 129, 160), (2, 300, 257), (1, 640, 700)):
        images = torch.rand(size[0], 3, *size[1:]) * 255
        with torch.no_grad():
            wanted = network(images)
        for actual, expected in zip(program(images), wanted):
            assert difference(actual, expected) < 1e-4


LOADS_WITHOUT_THIS_PACKAGE = """
import sys
sys.modules["sasa_det"] = sys.modules["detectron2"] = None
import torch
images, expected = torch.load(sys.argv[2])
program = torch.export.load(sys.argv[1]).module()
for actual, wanted in zip(program(images), expected):
    assert (actual - wanted).norm() < 1e-4 * wanted.norm()
print("equal")
"""


@pytest.mark.slow
def test_the_program_of_a_faster_rcnns_backbone_keeps_the_operators_or_needs_torch_alone(
    tmp_path,
):
    model = small("retinanet_full_attn", *TWO_LEVELS, *TWO_STAGES)
    network = network_of(model)
    assert network.output_names == ("p4", "p5", "p6")
    images = torch.rand(1, 3, 150, 135) * 255
    with torch.no_grad():
        expected = network(images)
    kept = export_program(network, keep_operators=True)
    operators = [str(n.target) for n in kept.graph.nodes if "sasa_det" in str(n.target)]
    assert len(operators) == 2  # the stem and one block
    decomposed = export_program(network)
    assert not any("sasa_det" in str(node.target) for node in decomposed.graph.nodes)
    for program in (kept, decomposed):
        for actual, wanted in zip(program.module()(images), expected):
            assert difference(actual, wanted) < 1e-5
    torch.export.save(decomposed, tmp_path / "model.pt2")
    torch.save((images, expected), tmp_path / "expected.pt")
    script = [LOADS_WITHOUT_THIS_PACKAGE, tmp_path / "model.pt2", tmp_path / "expected.pt"]
    run = subprocess.run(
        [sys.executable, "-c", *script], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.stdout == "equal\n", run.stderr


@pytest.mark.parametrize(
    ("output", "weights", "options", "message"),
    [
        ("model.txt", "", [], "--output must end in .onnx or .pt2"),
        ("model.onnx", "", ["--keep-operators"], "--keep-operators is for .pt2 files"),
        ("model.onnx", "nothing.pth", [], "checkpoint 'nothing.pth' of MODEL.WEIGHTS does not ex"),
        ("model.onnx", "other", [], "stem.attention.query_key_weight is not in it"),
        ("model.onnx", "", ["--beside", "no.onnx"], "The file 'no.onnx' of --beside does not"),
        ("model.onnx", "", ["--beside", "setup.py"], "ONNX Runtime cannot open 'setup.py' of -"),
        ("file/model.pt2", "", [], "file' cannot be written: File exists; choose another."),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_sentence(
    output, weights, options, message, tmp_path
):
    if weights == "other":
        weights = tmp_path / "other.pth"
        torch.save({"model": small("retinanet_conv").state_dict()}, weights)
    (tmp_path / "file").touch()
    run = export("retinanet_full_attn", tmp_path / output, weights, *options)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: ")
    assert message in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert not (tmp_path / output).exists()


def test_a_missing_library_is_named_with_the_extra_that_has_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r'needs onnxscript.*pip install -e "\.\[deployment\]"'):
        require("onnx", "onnxscript")
