"""RetinaNet whose head may be made of attention."""

import math
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.retinanet import RetinaNet, RetinaNetHead
from detectron2.utils.comm import get_world_size
from torch import Tensor, nn

from sasa_det.config import check_sasa_config
from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.layers.local_attention import NormReLU, has_hooks
from sasa_det.ops import (
    NormedLayer,
    can_pack_levels,
    normed_attention,
    pack_levels,
    unpack_levels,
)
from sasa_det.ops.functional import shared_casts

from .norm import attention_norm


@META_ARCH_REGISTRY.register()
class SASARetinaNet(RetinaNet):
    """detectron2's RetinaNet; with ``MODEL.SASA.HEAD_ATTENTION`` its head is made of attention.

    Its losses are divided by the moving average of a batch's foreground anchors. detectron2 takes
    the average in each process by itself; here it is that of the whole batch, so that training does
    not depend on how a batch is shared out to processes and parts.

    Attributes:
        num_parts (int): forward passes that a process needs for its share of a batch. With more
            than one, :meth:`end_batch` must follow the last.
        loss_normalizer (float): the moving average.
    """

    num_parts = 1
    # Later versions of detectron2 create it in the first step.
    loss_normalizer: float = 100
    loss_normalizer_momentum = 0.9
    # Of the batch so far, in this process.
    _foreground: Tensor | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        check_sasa_config(cfg)
        arguments = super().from_config(cfg)
        # RetinaNet.from_config builds its own head and offers no other way to choose one.
        if cfg.MODEL.SASA.HEAD_ATTENTION:
            shapes = arguments["backbone"].output_shape()
            input_shape = [shapes[name] for name in cfg.MODEL.RETINANET.IN_FEATURES]
            arguments["head"] = AttentionRetinaNetHead(cfg, input_shape)
        return arguments

    def losses(
        self,
        anchors: Any,
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        # Sums over all anchors, for which the precisions of autocast are too coarse.
        logits, deltas = (
            [x.to(torch.promote_types(x.dtype, torch.float32)) for x in predictions]
            for predictions in (pred_logits, pred_anchor_deltas)
        )
        average = self.loss_normalizer
        # TorchScript optimises the focal loss in its third run, which changes the last bits: on the
        # CPU a resumed training is to equal an uninterrupted one.
        with torch.jit.optimized_execution(logits[0].device.type != "cpu"):
            losses = super().losses(anchors, logits, gt_labels, deltas, gt_boxes)
        average_here, self.loss_normalizer = self.loss_normalizer, average
        if not torch.is_grad_enabled():  # nobody learns from it: the average is of the training
            return {name: loss * (average_here / average) for name, loss in losses.items()}
        labels = torch.stack(gt_labels)
        foreground = ((labels >= 0) & (labels != self.num_classes)).sum()
        self._foreground = foreground if self._foreground is None else self._foreground + foreground
        if self.num_parts == 1:
            self._update_average()
        # The processes' and the parts' gradients are averaged, but these sums belong together.
        shares = get_world_size() * self.num_parts
        scale = shares * average_here / self.loss_normalizer
        return {name: loss * scale for name, loss in losses.items()}

    def end_batch(self) -> float:
        """After the last part: what the losses and gradients of the batch are to be multiplied by.

        Each part was divided by the average before the batch, as its foreground was unknown yet.
        """
        before = self.loss_normalizer
        self._update_average()
        return before / self.loss_normalizer

    def _update_average(self) -> None:
        foreground = self._foreground
        assert foreground is not None
        if get_world_size() > 1:
            dist.all_reduce(foreground)
        momentum = self.loss_normalizer_momentum
        new = max(int(foreground), 1)
        self.loss_normalizer = momentum * self.loss_normalizer + (1 - momentum) * new
        self._foreground = None


class AttentionRetinaNetHead(RetinaNetHead):
    """RetinaNet's head with local self-attention in the place of each 3x3 convolution.

    Tower layers become attention; a predictor becomes attention followed by a 1x1 convolution.
    Each attention, and that convolution, stands behind a norm and ReLU, each attention inside a
    residual connection.

    Args:
        input_shape (list[ShapeSpec]): shapes of the FPN levels, all with the same channels.
        num_classes, num_anchors, conv_dims, prior_prob: as in detectron2's ``RetinaNetHead``;
            all conv_dims must be the channels of the input.
        norm (str): in front of each attention and predictor; GN where it is empty.
        kernel_size (int): side of the attention window, odd.
        num_heads (int): heads of the attention.
        position (str): "relative" or "none".
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: list[ShapeSpec],
        num_classes: int,
        num_anchors: int,
        conv_dims: list[int],
        norm: str = "",
        prior_prob: float = 0.01,
        kernel_size: int = 7,
        num_heads: int = 8,
        position: str = "relative",
    ) -> None:
        super().__init__(
            input_shape=input_shape,
            num_classes=num_classes,
            num_anchors=num_anchors,
            conv_dims=conv_dims,
            prior_prob=prior_prob,
        )
        channels = input_shape[0].channels
        if any(dim != channels for dim in conv_dims):
            raise ValueError(
                f"conv_dims must all be the {channels} channels of the input, but are {conv_dims}: "
                "the residual connections keep the number of channels."
            )

        if norm.endswith("BN"):
            raise ValueError(
                f"MODEL.RETINANET.NORM cannot be {norm!r} in an attention head, because all FPN "
                'levels share its layers; set it to "GN".'
            )

        def attention() -> PreActivationSelfAttention2d:
            layer = LocalSelfAttention2d(
                channels, channels, kernel_size, num_heads, position=position
            )
            return PreActivationSelfAttention2d(layer, attention_norm(norm, channels))

        def tower() -> nn.Sequential:
            return nn.Sequential(*(attention() for _ in conv_dims))

        def predictor(outputs: int, bias: float) -> nn.Sequential:
            projection = nn.Conv2d(channels, outputs, kernel_size=1)
            nn.init.normal_(projection.weight, std=0.01)
            nn.init.constant_(projection.bias, bias)  # type: ignore[arg-type]
            # The norm makes the small weights keep to the prior: residual sums grow with depth.
            activation = NormReLU(attention_norm(norm, channels))
            return nn.Sequential(attention(), activation, projection)

        self.cls_subnet, self.bbox_subnet = tower(), tower()
        # The prior of the focal loss: at the start every class has the probability prior_prob.
        self.cls_score = predictor(
            num_anchors * num_classes, bias=-math.log((1 - prior_prob) / prior_prob)
        )
        self.bbox_pred = predictor(num_anchors * 4, bias=0.0)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        with shared_casts():  # the levels of the FPN share the weights
            at_once = self._levels_at_once(features)
            return super().forward(features) if at_once is None else at_once

    def _levels_at_once(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]] | None:
        """As :meth:`forward`, each subnet with one call for all levels; None if there is no such.

        Small levels take less time on a GPU than their calls in Python.
        """
        if len(features) < 2 or not can_pack_levels(features):
            return None
        # They count on being called for each level.
        if any(has_hooks(module) for module in self.modules() if module is not self):
            return None
        subnets = (
            _parts(self.cls_subnet, self.cls_score),
            _parts(self.bbox_subnet, self.bbox_pred),
        )
        packed, levels = pack_levels(features)
        outputs = []
        for parts in subnets:
            output = None if parts is None else normed_attention(packed, parts, levels)
            if output is None:
                return None
            outputs.append(unpack_levels(output, levels))
        return outputs[0], outputs[1]

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        sasa = cfg.MODEL.SASA
        return {
            **super().from_config(cfg, input_shape),
            "kernel_size": sasa.KERNEL_SIZE,
            "num_heads": sasa.NUM_HEADS,
            "position": sasa.POSITION,
        }


def _parts(subnet: nn.Module, predictor: nn.Module) -> list[NormedLayer] | None:
    """What all layers compute with; None where another module was put in the place of one."""
    if type(subnet) is not nn.Sequential or type(predictor) is not nn.Sequential:
        return None
    *layers, activation, projection = (*subnet, *predictor)
    if type(activation) is not NormReLU:
        return None
    parts = []
    for layer in layers:
        of_layer = layer.parts() if type(layer) is PreActivationSelfAttention2d else None
        if of_layer is None:
            return None
        parts.append(of_layer)
    last = activation.parts(projection)
    return None if last is None else [*parts, last]
