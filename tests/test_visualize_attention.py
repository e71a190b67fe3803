"""``tools/visualize_attention.py``: what is drawn stands where the model looked."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sasa_det  # noqa: F401

# isort: split
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from PIL import Image
from torch import nn

from sasa_det.analysis import attention_figures
from sasa_det.analysis.attention import Window, find_stride, look, received_attention
from sasa_det.analysis.attention_figures import (
    Point,
    View,
    draw_heads,
    draw_window,
    enlarged,
    whole,
)
from sasa_det.config import load_config
from sasa_det.layers import LocalSelfAttention2d, StemSelfAttention2d, attention_layers

STRIDE = 8
# Wider than high, scaled by 2 in the model's input, and padded there from 176x272 to 192x288.
HEIGHT, WIDTH = 88, 136


class BrightestPatch(nn.Module):
    """A detector whose one head attends to the brightest patch within its window, and only it."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.AvgPool2d(STRIDE)
        self.attention = LocalSelfAttention2d(2, 2, kernel_size=5, num_heads=1, position="none")
        # The query is the channel of ones, the key the brightness.
        query, key, value = torch.zeros(3, 2, 2)
        query[0, 1], key[0, 0] = 100, 1
        self.attention.projection.weight.data = torch.cat([query, key, value])[:, :, None, None]

    def forward(self, samples):
        images = ImageList.from_tensors([x["image"].float() for x in samples], 32).tensor / 255
        brightness = self.backbone(images.mean(dim=1, keepdim=True))
        self.attention(torch.cat([brightness, torch.ones_like(brightness)], dim=1))
        (sample,) = samples
        instances = Instances((sample["height"], sample["width"]), pred_boxes=Boxes(torch.empty(0)))
        return [{"instances": instances}]


def picture_with_patch(row, col, cell):
    """Black but for the cell of pixels that a position of the map covers."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[row * cell : (row + 1) * cell, col * cell : (col + 1) * cell] = 255
    return picture


@pytest.mark.parametrize(
    ("patch", "point"),
    [
        ((5, 9), (42.0, 18.0)),
        ((3, 2), (3.9, 13.0)),
        ((0, 33), (133.0, 2.0)),
        ((21, 33), (135.9, 87.9)),
    ],
    ids=["inside", "left border", "top right corner", "bottom right corner"],
)
def test_the_weights_in_the_drawing_stand_at_the_pixels_attended_to(patch, point):
    cell = STRIDE // 2  # of the picture, which the model sees at twice its size
    picture = picture_with_patch(*patch, cell)
    scaled = torch.from_numpy(picture).permute(2, 0, 1).float()[None]
    scaled = F.interpolate(scaled, scale_factor=2, mode="nearest")[0]
    sample = {"image": scaled, "height": HEIGHT, "width": WIDTH}
    seen = look(BrightestPatch().eval(), sample, "attention")
    window = seen.window(point)
    assert seen.input_size == (192, 288)
    hot = drawn_red(picture, window)
    # The same pixels, but for the frame of the window.
    white = picture.any(axis=2)
    assert hot[white].mean() > 0.8
    assert hot[~white].mean() < 0.001


def drawn_red(picture, window):
    """Where a drawing of the picture's size is as red as the strongest weight."""
    from matplotlib import pyplot

    height, width = picture.shape[:2]
    figure = pyplot.figure(figsize=(width / 100, height / 100), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.axis("off")
    draw_window(axis, picture, window.weights[0], window.extent, window.weights.max())
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    pyplot.close(figure)
    assert pixels.shape == picture.shape
    return (pixels[..., 0] > 100) & (pixels[..., 1] < 60) & (pixels[..., 2] < 120)


def test_uniform_attention_is_received_as_one_everywhere():
    local = LocalSelfAttention2d(4, 4, kernel_size=5, num_heads=2)
    stem = StemSelfAttention2d(3, 4, num_heads=2)
    for layer, channels in ((local, 4), (stem, 3)):
        # Zero input, zero queries: clipped windows and blocks attend to fewer positions.
        weights = layer.attention_weights(torch.zeros(1, channels, 6, 9))
        torch.testing.assert_close(received_attention(layer, weights), torch.ones(6, 9))


def test_received_attention_by_hand():
    """All look one position up and two to the right, and none at the rest of their windows."""
    layer = LocalSelfAttention2d(4, 4, kernel_size=5, num_heads=2)
    weights = torch.zeros(1, 2, 5, 5, 6, 9)
    weights[:, :, 1, 4] = 1
    received = received_attention(layer, weights.flatten(2, 3))
    assert received[:-1, 2:].min() > 0
    assert received[-1].max() == received[:, :2].max() == 0
    assert received[2, 4] == pytest.approx(1 / (1 / 25 * 25), rel=0.3)
    stem = StemSelfAttention2d(3, 4, num_heads=2)
    weights = torch.zeros(1, 2, 16, 6, 9)
    weights[:, :, 1 * 4 + 2] = 1  # in each block one pixel, (1, 2), has the attention of all 16
    received = received_attention(stem, weights)
    assert received[1, 2] == received[1, 6] == 16
    assert received.sum() == 16 * 2 + 8 * 2  # the lower blocks are half as high; one is too narrow


def test_a_map_that_is_none_of_the_image_is_refused():
    assert find_stride((6, 9), (192, 288)) == 32
    assert find_stride((2, 3), (192, 288)) == 128  # p7, whose last positions reach over the border
    assert find_stride((192, 288), (192, 288)) == 1
    with pytest.raises(ValueError, match="maps of 14x14 positions do not cover"):
        find_stride((14, 14), (192, 288))


def test_a_small_window_is_shown_with_its_surroundings_and_a_large_one_on_the_whole_picture():
    left, right, bottom, top = enlarged((-8, 12, 32, 12), (100, 200))
    assert (left, top) == (0, 0)  # moved inside
    assert right == bottom == pytest.approx(44)
    assert enlarged((10, 90, 90, 10), (100, 200)) == whole((100, 200))


def test_three_pages_are_drawn_of_the_centres_of_the_detections(
    call_tool, untrained_demo, digits, tmp_path
):
    code, printed = call_tool(
        *("visualize_attention.py", digits / "val" / "000001.jpg", "--output", tmp_path),
        *untrained_demo,
    )
    assert code is None
    for name in ("heads.png", "layers.png", "embeddings.png"):
        assert str(tmp_path / name) in printed
        with Image.open(tmp_path / name) as page:
            width, height = page.size
        assert 1000 < width < 1100
        assert height <= width * 2**0.5 + 2  # A4


def test_the_stem_before_and_after_training_on_a_real_photograph(
    call_tool, untrained_demo, coco_slice, tmp_path
):
    photo = coco_slice / "coco" / "val2017" / "000000208901.jpg"
    stem = ["--layer", "backbone.bottom_up.stem.attention"]
    options = ["--points", "639,426", "--before-training", "--output", tmp_path, *stem]
    code, _ = call_tool("visualize_attention.py", photo, *options, *untrained_demo)
    assert code is None
    assert len(list(tmp_path.iterdir())) == 3


def test_what_does_not_fit_on_a_page_goes_on_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr(attention_figures, "PAGE_HEIGHT", 4)
    picture = np.zeros((32, 32, 3), np.uint8)
    window = Window(np.full((1, 3, 3), 1 / 9), (4, 16, 16, 4))
    views = [View("", Point(x, 10), window) for x in (8, 9)]
    written = draw_heads(picture, views, "One head", tmp_path / "heads.png")
    assert written == [tmp_path / "heads.png", tmp_path / "heads_2.png"]
    assert all(path.is_file() for path in written)


def test_every_attention_layer_of_the_detector_is_seen_and_the_detections_stay(untrained_demo):
    model = build_model(load_config(untrained_demo[1], untrained_demo[4:])).eval()
    DetectionCheckpointer(model).load(untrained_demo[3])
    sample = {"image": 255 * torch.rand(3, 128, 160), "height": 64, "width": 80}
    with torch.no_grad():
        wanted = model([sample])[0]["instances"]
    seen = look(model, sample, "head.cls_subnet.0.attention")
    assert set(seen.received) == set(attention_layers(model))
    assert "backbone.bottom_up.stem.attention" in seen.received
    assert [w.shape[2:] for w in seen.weights] == [(16, 20), (8, 10), (4, 5)]
    torch.testing.assert_close(seen.instances.scores, wanted.scores)
    assert seen.window((79, 63)).extent == (68, 88, 72, 52)
    assert seen.window((79, 63), level=2).extent == (32, 112, 96, 16)
    with pytest.raises(ValueError, match="no level 3: the layer ran on 3"):
        seen.window((0, 0), level=3)


@pytest.mark.parametrize(
    ("images", "options", "sentence"),
    [
        (["none.jpg"], [], "The image 'none.jpg' cannot be used: [Errno 2] No such file"),
        (["{broken}"], [], "broken.jpg' cannot be used: "),
        (["{image}", "{broken}"], [], "one image is looked at, but 2 are given"),
        (
            ["{image}"],
            ["--points", "128,5"],
            "The point 128,5 lies outside the image, which is",
        ),
        (
            ["{image}"],
            ["--points", "12"],
            "A point is x,y in pixels, such as 120,80, but not '12'",
        ),
        (["{image}"], ["--layer", "res5.0"], "'res5.0'; there are backbone.bottom_up.stem.atten"),
        (["{image}"], ["--level", "3"], "There is no level 3: the layer ran on 3, 0 the finest."),
        (["{image}"], ["--output", "{broken}"], "broken.jpg' cannot be written: File exists; cho"),
    ],
    ids=["image", "broken", "two", "outside", "point", "layer", "level", "output"],
)
def test_a_mistake_is_answered_in_one_sentence(
    call_tool, untrained_demo, digits, tmp_path, images, options, sentence
):
    image, broken = digits / "val" / "000001.jpg", tmp_path / "broken.jpg"
    broken.write_bytes(image.read_bytes()[:700])
    images = [name.format(image=image, broken=broken) for name in images]
    options = ["--output", tmp_path, *(option.format(broken=broken) for option in options)]
    code, printed = call_tool("visualize_attention.py", *images, *options, *untrained_demo)
    assert sentence in (printed if code == 2 else code)
    assert "Traceback" not in printed


def test_a_page_is_not_drawn_over_the_image(call_tool, untrained_demo, digits, tmp_path):
    image = tmp_path / "heads.png"
    image.write_bytes((digits / "val" / "000001.jpg").read_bytes())
    before = image.read_bytes()
    code, _ = call_tool("visualize_attention.py", image, "--output", tmp_path, *untrained_demo)
    assert "heads.png' is one of the files that are read" in code
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("MODEL.WEIGHTS", "a.pth", "The checkpoint 'a.pth' of MODEL.WEIGHTS does not exist."),
        ("MODEL.WEIGHTS", "", "The checkpoint is missing: add MODEL.WEIGHTS FILE"),
        ("MODEL.WEIGHTS", "{text}", "is refused: it is damaged or holds more"),
        ("MODEL.RESNETS.DEPTH", "50", "is of another depth, width or window"),
        ("MODEL.SASA.HEAD_ATTENTION", "False", "head.cls_subnet.0.weight is not in"),
        (
            "MODEL.RETINANET.NUM_CLASSES",
            "80",
            "weight is 60x64x1x1 there and 480x64x1x1 in",
        ),
        (
            "MODEL.SASA.POSITION",
            "none",
            "of its tensors have no place in the model, for instance backbone.bottom_up.stem.att",
        ),
        ("MODEL.RETINANET.SCORE_THRESH_TEST", "0.9", "The model detects nothing on the image;"),
    ],
    ids=["missing", "none", "unreadable", "depth", "head", "classes", "position", "nothing"],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_sentence(
    call_tool, untrained_demo, digits, tmp_path, key, value, sentence
):
    text = tmp_path / "text.pth"
    text.write_text("not a checkpoint")
    image = digits / "val" / "000001.jpg"
    options = ["--output", tmp_path, *untrained_demo, key, value.format(text=text)]
    code, printed = call_tool("visualize_attention.py", image, *options)
    assert sentence in code
    assert "Traceback" not in printed
