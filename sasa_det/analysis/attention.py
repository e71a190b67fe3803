"""What a detector attends to, in pixels of the picture it looks at."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor, nn

from sasa_det.layers import StemSelfAttention2d, attention_layers, record_attention
from sasa_det.layers.recording import AttentionLayer, check_layer

Extent = tuple[float, float, float, float]  # left, right, bottom, top: the order of matplotlib


class Window(NamedTuple):
    """What the heads of a layer attend to from one point."""

    weights: np.ndarray  # (num_heads, k, k), zero outside the map
    extent: Extent  # of the k x k positions on the picture, whose border it may cross


@dataclass(frozen=True)
class Look:
    """The attention of a model over one picture, and what it detected there.

    Args:
        layer: the layer that was looked at.
        weights: what it attended to, (num_heads, k * k, H, W) for each of its calls.
        received: see :func:`received_attention`, of the first call of every attention layer.
        instances: the detections, in pixels of the picture; None of a model that makes none.
        scale: (across, down), pixels of the model's input for each of the picture's.
        input_size: (height, width) of that input, with its padding at the bottom and the right.
    """

    layer: AttentionLayer
    weights: list[Tensor]
    received: dict[str, Tensor]
    instances: Instances | None
    scale: tuple[float, float]
    input_size: tuple[int, int]

    def window(self, point: tuple[float, float], level: int = 0) -> Window:
        """What the layer attends to from the point (x, y) of the picture, in its call ``level``.

        Raises:
            ValueError: if it was not called as often.
        """
        calls = len(self.weights)
        if not 0 <= level < calls:
            raise ValueError(f"There is no level {level}: the layer ran on {calls}, 0 the finest.")
        weights = self.weights[level]
        height, width = weights.shape[-2:]
        across, down = self._cell((height, width))
        row, col = min(int(point[1] / down), height - 1), min(int(point[0] / across), width - 1)
        side = round(weights.shape[1] ** 0.5)
        top, left = self.layer.window_corner(row, col)
        extent = (left * across, (left + side) * across, (top + side) * down, top * down)
        return Window(weights[:, :, row, col].unflatten(1, (side, side)).numpy(), extent)

    def extent(self, map_size: torch.Size | tuple[int, int]) -> Extent:
        """Where a whole map (height, width) lies, padding and all."""
        across, down = self._cell(map_size)
        return 0.0, map_size[1] * across, map_size[0] * down, 0.0

    def _cell(self, map_size: torch.Size | tuple[int, int]) -> tuple[float, float]:
        """What one position of a map covers of the picture: pixels across and down."""
        stride = find_stride(map_size, self.input_size)
        return stride / self.scale[0], stride / self.scale[1]


@torch.no_grad()
def look(model: nn.Module, sample: dict[str, Any], layer: str) -> Look:
    """Runs a detector of detectron2 over one picture and records what it attends to.

    Args:
        model (nn.Module): in evaluation mode, with a ``backbone``.
        sample (dict): what the model takes: "image", Tensor[3, H, W], and the picture's "height"
            and "width".
        layer (str): which one to look at, one of ``attention_layers(model)``.

    Raises:
        ValueError: if there is no such layer, or if its maps do not lie on the image.
    """
    input_sizes: list[tuple[int, int]] = []

    def note_size(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        input_sizes.append((inputs[0].shape[-2], inputs[0].shape[-1]))

    check_layer(layer, attention_layers(model))
    handle = model.get_submodule("backbone").register_forward_pre_hook(note_size)
    try:
        # Of the other layers the averages alone are kept: all weights would be gigabytes.
        with (
            record_attention(model, keep=received_attention) as received,
            record_attention(model, [layer]) as recorded,
        ):
            (output,) = model([sample])
    finally:
        handle.remove()
    height, width = sample["image"].shape[-2:]
    instances = output.get("instances")
    seen = Look(
        layer=attention_layers(model)[layer],
        weights=[weights[0].float().cpu() for weights in recorded[layer]],
        received={name: calls[0] for name, calls in received.items() if calls},
        instances=None if instances is None else instances.to("cpu"),
        scale=(width / sample["width"], height / sample["height"]),
        input_size=input_sizes[0],
    )
    for weights in seen.weights:
        find_stride(weights.shape[-2:], seen.input_size)
    return seen


def received_attention(layer: AttentionLayer, weights: Tensor) -> Tensor:
    """How much each position of the first image is attended to, whoever looks.

    Args:
        layer: where the weights come from.
        weights (Tensor[N, num_heads, k * k, H, W]): its ``attention_weights``.

    Returns:
        Tensor[H, W] on the CPU: averaged over heads and over all positions that have it in their
        window; 1 is what it would be if all attended uniformly.
    """
    mean = weights[0].float().mean(dim=0, keepdim=True)  # (1, k * k, H, W)
    height, width = mean.shape[-2:]
    side = round(mean.shape[1] ** 0.5)
    if isinstance(layer, StemSelfAttention2d):
        padded = F.pad(mean, (0, -width % side, 0, -height % side))
        in_blocks = F.avg_pool2d(padded, side, divisor_override=1)  # summed over who looks
        return F.pixel_shuffle(in_blocks, side)[0, 0, :height, :width].cpu()

    def gather(by_window: Tensor) -> Tensor:
        return F.fold(by_window, (height, width), side, padding=side // 2)[0, 0]

    inside = F.unfold(mean.new_ones(1, 1, height, width), side, padding=side // 2)
    uniform = inside / inside.sum(dim=1, keepdim=True)
    return (gather(mean.flatten(2)) / gather(uniform)).cpu()


def find_stride(map_size: torch.Size | tuple[int, int], input_size: tuple[int, int]) -> int:
    """Pixels of a model's input for each position of a map, both (height, width).

    Raises:
        ValueError: if the map is none of the whole input.
    """
    for stride in (2**i for i in range(12)):
        if all(-(-pixels // stride) == size for pixels, size in zip(input_size, map_size)):
            return stride
    raise ValueError(
        f"The layer's maps of {map_size[0]}x{map_size[1]} positions do not cover the model's input "
        f"of {input_size[0]}x{input_size[1]} pixels; choose a layer of the backbone, the FPN or "
        "a head that sees the whole image."
    )
