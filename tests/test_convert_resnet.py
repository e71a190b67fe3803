"""Warm starts: a convolutional checkpoint of any maker fills an attention model."""

import os
import pickle
import re
import resource

import pytest
import torch
import torch.nn.functional as F
import torchvision

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from test_models import a_sample, small
from test_training import QUICK, train_net

from sasa_det.config import load_config
from sasa_det.modeling import make_sasa_resnet
from sasa_det.warm_start import (
    build_teacher,
    convert,
    distill,
    find_images,
    measure_norms,
    read_checkpoint,
)
from sasa_det.warm_start.images import image_loaders
from sasa_det.weight_files import write_weights

CONV = ["MODEL.SASA.STEM", "conv", "MODEL.SASA.ATTENTION_STAGES", "()"]
CONV += ["MODEL.SASA.HEAD_ATTENTION", "False", "MODEL.SASA.FPN_ATTENTION", "False"]
NARROW = {"depth": 26, "stem": "conv", "attention_stages": (), "bottleneck_channels": 16}
NARROW |= {"stem_channels": 16, "res2_channels": 32}
WIDE = ["MODEL.RESNETS.WIDTH_PER_GROUP", "32"]
HEADS = ["MODEL.SASA.NUM_HEADS", "4"]


def with_statistics(model):
    """As if it had been trained: no norm is trivial."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.3)
    return model.eval()


def caffe2_names(name):
    """As MSRA's R-50.pkl names what detectron2 names so."""
    name = name.replace("stem.conv1.norm", "res_conv1_bn").replace("stem.conv1", "conv1")
    name = name.replace("shortcut", "branch1").replace("conv3", "branch2c")
    name = re.sub(r"(res\d\.\d+)\.conv1", r"\1.branch2a", name).replace("conv2", "branch2b")
    name = re.sub(r"\.norm", "_bn", name)
    bn = "_bn" in name
    name = re.sub(r"\.weight$", "_s" if bn else "_w", name)
    return re.sub(r"\.bias$", "_b", name).replace(".", "_")


def msra_resnet(path):
    """A narrow ResNet in the format of MSRA's: python lists, folded norms, strides in the 1x1.

    A bias before its stem's norm is the norm's mean.
    """
    resnet = with_statistics(make_sasa_resnet(norm="FrozenBN", stride_in_1x1=True, **NARROW))
    for name, buffer in resnet.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(0 if name.endswith("mean") else 1 - 1e-5)
    blobs = {
        caffe2_names(name): tensor.numpy()
        for name, tensor in resnet.state_dict().items()
        if "running" not in name
    }
    blobs["conv1_b"] = blobs["res_conv1_bn_b"] * 0 + 0.5
    resnet.stem.conv1.norm.running_mean.fill_(-0.5)
    path.write_bytes(pickle.dumps({"blobs": blobs, "cfg": "a text"}, protocol=2))
    return resnet


def conv_detector(path, *overrides):
    """A narrow convolutional RetinaNet of ours, saved as a training leaves it."""
    model = with_statistics(build_model(small("retinanet_conv", *overrides)))
    torch.save({"model": model.state_dict(), "iteration": 7}, path)
    return model


@pytest.mark.parametrize(
    "pixels",
    [
        [],
        ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"],
        ["MODEL.PIXEL_MEAN", "[90, 90, 90]", "MODEL.PIXEL_STD", "[1, 1, 1]"],
    ],
    ids=["BGR", "RGB", "others"],
)
def test_torchvisions_resnet50_starts_a_detector_with_a_conv_stem(pixels, tmp_path):
    """Equal activations up to the first attention, from the pixels of an image file."""
    theirs = with_statistics(torchvision.models.resnet50(weights=None))
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", *pixels]
    cfg = load_config(str(CONFIGS / "retinanet_convstem_attn.yaml"), overrides)
    model = build_model(cfg)
    conversion = convert(model, read_checkpoint(str(tmp_path / "resnet50.pth")), cfg)
    write_weights(conversion.tensors(model), str(tmp_path / "start.pth"))

    started = build_model(cfg).eval()
    loaded = DetectionCheckpointer(started)._load_model(torch.load(tmp_path / "start.pth"))
    assert not loaded.unexpected_keys
    assert not loaded.incorrect_shapes
    resnet = "backbone.bottom_up."
    assert all(".attention." in name for name in loaded.missing_keys if name.startswith(resnet))

    rgb = a_sample()["image"].round()
    x = torchvision.transforms.functional.normalize(
        rgb[None] / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    image = rgb if "RGB" in pixels else rgb.flip(0)
    ours = started.backbone.bottom_up
    with torch.no_grad():
        stem = ours.stem(started.preprocess_image([{"image": image}]).tensor)
        their_stem = theirs.maxpool(F.relu(theirs.bn1(theirs.conv1(x))))
        first = theirs.layer1[0]
        their_first = first.bn1(first.conv1(their_stem))
        first = ours.res2[0].conv1(stem)
    # Another mean changes what is around the image, so what is beside its border.
    border = 2 if "[90, 90, 90]" in pixels else 0
    shown = ..., slice(border, 24 - border), slice(border, 32 - border)
    torch.testing.assert_close(stem[shown], their_stem[shown], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(first[shown], their_first[shown], rtol=1e-4, atol=1e-4)
    theirs_last = theirs.layer4[2].bn2.state_dict()
    for name, tensor in ours.res5[2].attention_norm.state_dict().items():
        torch.testing.assert_close(tensor, theirs_last[name])


def test_msras_pickle_is_read_and_keeps_its_function(tmp_path):
    resnet = msra_resnet(tmp_path / "R-50.pkl")
    source = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert source.has_folded_norms()
    for name, tensor in resnet.state_dict().items():
        torch.testing.assert_close(source.tensors[name], tensor)
    # It downsamples elsewhere than convolutional stages of the config: it says so.
    cfg = small("retinanet_full_attn", *HEADS, *CONV)
    with pytest.raises(ValueError, match=r"add MODEL.RESNETS.STRIDE_IN_1X1 True\.$"):
        convert(build_model(cfg), source, cfg)
    # The teacher gives the 3x3 convolution the full resolution, and is the same function.
    cfg = small("retinanet_full_attn", *HEADS)
    teacher, _ = build_teacher(source, cfg)
    image = a_sample(64, 96)["image"]
    expected = resnet((image - torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1))[None])["res5"]
    x = teacher.preprocess_image([{"image": image}]).tensor
    torch.testing.assert_close(
        teacher.backbone.bottom_up(x)["res5"], expected, rtol=1e-3, atol=1e-3
    )


def test_norms_without_statistics_get_measured_ones(coco_slice, tmp_path):
    """Nothing changes in evaluation, and next to nothing where they begin to train."""
    msra_resnet(tmp_path / "R-50.pkl")
    source = read_checkpoint(str(tmp_path / "R-50.pkl"))
    cfg = small(
        "retinanet_full_attn", *HEADS, "INPUT.IMAGE_SIZE", "64", "DATALOADER.NUM_WORKERS", "0"
    )
    images = find_images(str(coco_slice / "coco" / "train2017"))
    measured = measure_norms(source, cfg, images)
    before, after = (build_teacher(s, cfg)[0].backbone.bottom_up for s in (source, measured))
    x = torch.randn(8, 3, 64, 64)
    expected = before(x)["res5"]
    torch.testing.assert_close(after(x)["res5"], expected, rtol=1e-3, atol=1e-3)
    norm = after.res2[0].conv1.norm
    assert norm.running_mean.any()
    torch.testing.assert_close(norm.running_var, norm.running_var.clamp(min=1e-6))


def test_detectron2s_copy_of_torchvisions_resnet_is_read(tmp_path):
    tensors = make_sasa_resnet(**NARROW).state_dict()
    content = {"model": {name: tensor.numpy() for name, tensor in tensors.items()}}
    content |= {"__author__": "torchvision", "matching_heuristics": True}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content))
    source = read_checkpoint(str(tmp_path / "R-50.pkl"))
    assert source.pixels.format == "RGB"
    assert not source.stride_in_1x1
    for name, tensor in tensors.items():
        torch.testing.assert_close(source.tensors[name], tensor)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_a_file_that_holds_code_is_refused(suffix, tmp_path):
    content = {"model": {"conv1_w": Malicious(tmp_path / "harm")}}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"is refused: .*\.$"):
        read_checkpoint(str(path))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.pth", b"no checkpoint", "refused: it is damaged"),
        ("a.pkl", b"no checkpoint", "a.pkl"),
        ("a.safetensors", b"no checkpoint", "cannot be read"),
        ("a.pkl", pickle.dumps({"weights": 1}), "holds no ResNet of bottlenecks"),
    ],
)
def test_what_is_no_checkpoint_is_named(name, content, sentence, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            ["MODEL.RESNETS.DEPTH", "38"],
            "backbone.bottom_up.res2.1.conv1.weight is not in the checkpoint; "
            "backbone.bottom_up.res2.1.conv1.norm.weight is not in the checkpoint; "
            "backbone.bottom_up.res2.1.conv1.norm.bias is not in the checkpoint; and ",
        ),
        (
            ["MODEL.RESNETS.WIDTH_PER_GROUP", "32"],
            "backbone.bottom_up.res2.0.conv1.weight is 16x16x1x1 there and 32x16x1x1 in the model;",
        ),
        (["MODEL.RETINANET.NUM_CLASSES", "7"], "head.cls_score.weight is 30x64x3x3 there and 42x"),
    ],
    ids=["depth", "width", "classes"],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_first_mismatches(
    other, sentence, tmp_path
):
    conv_detector(tmp_path / "conv.pth")
    source = read_checkpoint(str(tmp_path / "conv.pth"))
    cfg = small("retinanet_convstem_attn_backbone", *HEADS, *other)
    model = build_model(cfg)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="of another depth, width") as error:
        convert(model, source, cfg)
    assert sentence in str(error.value)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])


def test_batch_norms_do_not_pass_for_group_norms(tmp_path):
    wide = make_sasa_resnet(**{**NARROW, "stem_channels": 32, "bottleneck_channels": 32})
    torch.save(wide.state_dict(), tmp_path / "a.pth")
    resnet = ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
    cfg = small("retinanet_convstem_attn_backbone", *HEADS, *resnet, *WIDE)
    with pytest.raises(ValueError, match=r"stem.conv1.norm.running_mean is not in the model"):
        convert(build_model(cfg), read_checkpoint(str(tmp_path / "a.pth")), cfg)


def test_our_convolutional_detector_fills_fpn_and_head(tmp_path):
    model = conv_detector(tmp_path / "conv.pth")
    source = read_checkpoint(str(tmp_path / "conv.pth"))
    # With convolutional heads, all but the attention of the backbone.
    cfg = small("retinanet_convstem_attn_backbone", *HEADS)
    conversion = convert(build_model(cfg), source, cfg)
    assert conversion.new
    assert all(".attention." in name for name in conversion.new)
    assert all(name.endswith("conv2.weight") for name in conversion.unused)
    # Into its own shape, everything.
    cfg = small("retinanet_conv")
    same = build_model(cfg)
    conversion = convert(same, source, cfg)
    assert not conversion.new
    assert not conversion.unused
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], tensor)


def test_what_has_the_same_name_and_another_meaning_stays(tmp_path):
    """The norm of an FPN's output convolution stands behind it, that of its attention before."""
    with_norm = ["MODEL.FPN.NORM", "GN"]
    conv_detector(tmp_path / "conv.pth", *with_norm)
    cfg = small("retinanet_full_attn_fpn", *HEADS, *with_norm)
    source = read_checkpoint(str(tmp_path / "conv.pth"))
    conversion = convert(build_model(cfg), source, cfg)
    assert "backbone.fpn_lateral3.norm.weight" in conversion.filled
    assert "backbone.fpn_output3.norm.weight" in conversion.new
    assert "backbone.fpn_output3.norm.weight" in conversion.unused


def test_towers_with_other_norms_than_the_checkpoints_teach_nothing(tmp_path):
    conv_detector(tmp_path / "conv.pth")
    source = read_checkpoint(str(tmp_path / "conv.pth"))
    with pytest.raises(ValueError, match=r"other towers than the config's: head.cls_subnet.1"):
        build_teacher(source, small("retinanet_full_attn", "MODEL.RETINANET.NORM", "GN"))


def test_distillation_lowers_the_error_of_every_layer_on_real_pictures(coco_slice, tmp_path):
    conv_detector(tmp_path / "conv.pth")
    source = read_checkpoint(str(tmp_path / "conv.pth"))
    size = ["INPUT.IMAGE_SIZE", "96", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "128"]
    cfg = small("retinanet_full_attn_fpn", *HEADS, *size, "DATALOADER.NUM_WORKERS", "0")
    model = build_model(cfg)
    conversion = convert(model, source, cfg)
    images = find_images(str(coco_slice / "coco" / "train2017"))
    errors = distill(model, source, cfg, images, steps=30, batch_size=2)
    assert [error for error in errors if not error.after < error.before] == []
    # The stem, eight bottlenecks, three outputs of the FPN, two towers of two and two predictors.
    assert len(errors) == 1 + 8 + 3 + 4 + 2
    assert model.backbone.bottom_up.stem.norm.running_mean.any()
    conversion.fit(error.name for error in errors)
    assert conversion.new == []
    # The ResNet alone teaches the ResNet alone.
    known = build_teacher(source.resnet(), cfg)[1]
    assert {"backbone.bottom_up.stem", "backbone.bottom_up.res5.0.conv2"} <= known
    assert not {"head.cls_subnet.0", "head.cls_score", "backbone.fpn_output3"} & known


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path):
    """On a full disk, or at a limit, what was there before stays."""
    path = tmp_path / "start.pth"
    write_weights({"a": torch.ones(3)}, str(path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"start\.pth"):
            write_weights({"a": torch.ones(2**20)}, str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [path]
    torch.testing.assert_close(torch.load(path)["model"]["a"], torch.ones(3))


def convert_resnet(*arguments):
    return run_tool("tools/convert_resnet.py", *arguments)


def test_the_tool_makes_a_checkpoint_that_a_training_starts_from(tmp_path):
    cfg = load_config(str(CONFIGS / "demo.yaml"), CONV)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "conv.pth")
    start = tmp_path / "new" / "start.pth"
    run = convert_resnet(
        *("--config", "configs/demo.yaml", "--weights", tmp_path / "conv.pth", "--output", start),
        *("--distill", "sasa_digits_val", "--steps", 2, "INPUT.MIN_SIZE_TEST", 64),
    )
    assert run.returncode == 0, run.stderr
    assert re.search(
        r"backbone.bottom_up.res4 +74 \(attention_norm, conv1, conv3, shortcut\) "
        r"+12 \(attention\) +4 \(conv2\)",
        run.stdout,
    )
    assert re.search(r"\nhead.cls_score +\d+\.\d{3} +\d+\.\d{3}\n", run.stdout)
    assert "does not say how it takes in pixels" in run.stdout
    options = ["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path / "out"]
    run = train_net("--config", "configs/demo.yaml", *QUICK, *options, "MODEL.WEIGHTS", start)
    assert "not found in the checkpoint" not in run.stdout + run.stderr


def test_an_image_that_cannot_be_read_is_named_by_both_loaders(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    cfg = load_config(str(CONFIGS / "demo.yaml"), ["DATALOADER.NUM_WORKERS", "1"])
    for name, loader in zip("ba", image_loaders(cfg, find_images(str(tmp_path)), 1)):
        with pytest.raises(ValueError, match=rf"^The image '.*{name}.png' cannot be used: "):
            next(iter(loader))


def test_the_tool_answers_a_mistake_in_one_sentence(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    run = convert_resnet(
        *("--config", "configs/demo.yaml", "--weights", tmp_path / "resnet18.pth"),
        *("--output", tmp_path / "start.pth"),
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: The checkpoint is of another depth")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "start.pth").exists()
