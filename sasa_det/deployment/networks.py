"""What of a detector is exported: images in, tensors out, and nothing but arithmetic between."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor, nn

from sasa_det.modeling import fold_batch_norm


class ExportedNetwork(nn.Module):
    """Normalises and pads images as detectron2 does, and takes them through the backbone.

    Args:
        model (nn.Module): a detector of detectron2. It stays as it is: batch norms are folded in a
            copy (see :func:`sasa_det.modeling.fold_batch_norm`).

    Attributes:
        output_names (tuple[str]): of what ``forward`` returns.
        divisor (int): of height and width after padding.
        max_stride (int): of the coarsest map.
        channels (int): C of the images, as many as ``MODEL.PIXEL_MEAN`` has.
    """

    output_names: tuple[str, ...]

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = fold_batch_norm(model)
        backbone: Any = self.model.backbone
        self.channels = self.model.pixel_mean.numel()  # type: ignore[operator,union-attr]
        self.divisor = max(backbone.size_divisibility, 1)
        self.max_stride = max(shape.stride for shape in backbone.output_shape().values())

    def features(self, images: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        images = (images - model.pixel_mean) / model.pixel_std
        # Written so that the exporter sees that the padded size is divisible.
        rows, cols = (
            (size + self.divisor - 1) // self.divisor * self.divisor - size
            for size in images.shape[-2:]
        )
        return model.backbone(F.pad(images, (0, cols, 0, rows)))


class DetectorNetwork(ExportedNetwork):
    """A RetinaNet up to its decoded boxes and scores; what remains is top-k and NMS.

    Shape:
        images (N, C, H, W): float32, 0 to 255, channels as ``INPUT.FORMAT`` says (BGR), any size.
        boxes (N, R, 4): of all R anchors, left, top, right, bottom in pixels, not clipped.
        scores (N, R, K): of the classes, after the sigmoid.
        levels (R,): int64, which level of the pyramid an anchor is of, 0 being the finest.
    """

    output_names = ("boxes", "scores", "levels")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model: Any = self.model
        features = self.features(images)
        maps = [features[name] for name in model.head_in_features]
        generator = model.anchor_generator
        anchors = [
            _anchors(x.shape[2], x.shape[3], stride, generator.offset, cells)
            for x, stride, cells in zip(maps, generator.strides, generator.cell_anchors)
        ]
        logits, deltas = (
            torch.cat([_by_anchor(x, values) for x in levels], dim=1)
            for levels, values in zip(model.head(maps), (model.num_classes, 4))
        )
        all_anchors = torch.cat(anchors).expand(images.shape[0], -1, -1).reshape(-1, 4)
        boxes = model.box2box_transform.apply_deltas(deltas.flatten(0, 1), all_anchors)
        levels = [torch.full_like(x[:, 0], i, dtype=torch.int64) for i, x in enumerate(anchors)]
        return boxes.view_as(deltas), logits.sigmoid(), torch.cat(levels)


class BackboneNetwork(ExportedNetwork):
    """The backbone of any detector: its maps, by their names, of the padded images.

    Shape:
        images (N, C, H, W): as of :class:`DetectorNetwork`.
        maps (N, D, H', W'): one for each of ``output_names``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.output_names = tuple(self.model.backbone.output_shape())  # type: ignore[operator]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.features(images)
        return tuple(features[name] for name in self.output_names)


def network_of(model: nn.Module) -> ExportedNetwork:
    """The whole of a RetinaNet; the backbone of any other detector."""
    return (DetectorNetwork if isinstance(model, RetinaNet) else BackboneNetwork)(model).eval()


def _anchors(height: int, width: int, stride: int, offset: float, cells: Tensor) -> Tensor:
    """detectron2's anchors of a level, (H * W * A, 4); its own meshgrid has no decomposition."""
    x, y = (
        (torch.arange(size, dtype=cells.dtype, device=cells.device) + offset) * stride
        for size in (width, height)
    )
    x, y = x.expand(height, -1), y[:, None].expand(-1, width)
    corners = torch.stack([x, y, x, y], dim=2)[:, :, None] + cells
    return corners.flatten(0, 2)


def _by_anchor(x: Tensor, values: int) -> Tensor:
    """(N, anchors * values, H, W) to (N, H * W * anchors, values)."""
    return x.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).flatten(1, 3)
