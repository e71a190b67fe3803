"""``tools/visualize_attention.py``: what is drawn stands where the model looked."""

import runpy
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS, ROOT
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.structures import Boxes, ImageList, Instances
from PIL import Image
from torch import nn

from sasa_det.analysis.attention import find_stride, look, received_attention
from sasa_det.analysis.attention_figures import draw_window, enlarged
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
