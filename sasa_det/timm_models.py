"""The paper's classifiers under names of timm; timm must be installed.

``import sasa_det.timm_models`` registers, each for depth 26, 38 and 50, ``sasa_resnet50`` (full
attention) and ``sasa_resnet50_convstem`` (convolutional stem):

    model = timm.create_model("sasa_resnet26", num_classes=10)

``checkpoint_path`` takes a checkpoint of tools/train_classifier.py. No weights come with it.
Not supported: ``features_only``, pooling but the average, decay by layer, gradient checkpointing.
"""

import inspect
from typing import Any

import torch.nn.functional as F
from detectron2.modeling import ResNet
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from sasa_det.classification import PIXEL_MEAN, PIXEL_STD
from sasa_det.modeling import make_sasa_resnet
from sasa_det.optimizer import POSITION_EMBEDDINGS

__all__ = ["SASAResNet"]  # timm adds the models


class SASAResNet(ResNet):
    """The ResNet of ``make_sasa_resnet`` with timm's methods.

    It takes RGB, as timm's loaders give it, and turns it into the BGR that its weights are for.

    Args:
        num_classes (int): 0 for none: the pooled features are returned.
        in_chans (int): channels of the image.
        drop_rate (float): of the dropout before the classifier.
        global_pool (str): "avg".
        options: of ``make_sasa_resnet``.

    Raises:
        ValueError: for another option, or what cannot be built.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
        **options: Any,
    ) -> None:
        known = inspect.signature(make_sasa_resnet).parameters
        for name in options:
            if name not in known:
                raise ValueError(f"SASAResNet has no {name}; what it takes: {', '.join(known)}.")
        parts = make_sasa_resnet(in_channels=in_chans, **options)
        super().__init__(parts.stem, [list(stage) for stage in parts.stages], num_classes=1)
        self.num_features: int = parts.output_shape()["res5"].channels
        self.head_hidden_size = self.num_features
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_features, H / 32, W / 32)."""
        x = self.stem(x.flip(1))
        for stage in self.stages:
            x = stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(self.avgpool(x).flatten(1), self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def get_classifier(self) -> nn.Module:
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool must be 'avg', but is {global_pool!r}.")
        self.num_classes = num_classes
        self.linear: nn.Module = nn.Identity()
        if num_classes:
            self.linear = linear = nn.Linear(self.num_features, num_classes)
            nn.init.normal_(linear.weight, std=0.01)  # as detectron2's ResNet does it

    def no_weight_decay(self) -> set[str]:
        names = (name for name, _ in self.named_parameters())
        return {name for name in names if name.rsplit(".", 1)[-1] in POSITION_EMBEDDINGS}


def _build(name: str, pretrained: bool, **options: Any) -> SASAResNet:
    if options.pop("features_only", False):
        raise ValueError(f"{name} has no features_only; use its forward_features.")
    return build_model_with_cfg(SASAResNet, name, pretrained, **options)


_NAMES = [f"sasa_resnet{depth}{stem}" for depth in (26, 38, 50) for stem in ("", "_convstem")]
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": tuple(x / 255 for x in reversed(PIXEL_MEAN)),
            "std": tuple(x / 255 for x in reversed(PIXEL_STD)),
            "first_conv": "stem.attention" if name[-1].isdigit() else "stem.conv1",
            "classifier": "linear",
        }
        for name in _NAMES
    }
)


@register_model
def sasa_resnet26(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet26", pretrained, depth=26, **options)


@register_model
def sasa_resnet26_convstem(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet26_convstem", pretrained, depth=26, stem="conv", **options)


@register_model
def sasa_resnet38(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet38", pretrained, depth=38, **options)


@register_model
def sasa_resnet38_convstem(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet38_convstem", pretrained, depth=38, stem="conv", **options)


@register_model
def sasa_resnet50(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet50", pretrained, depth=50, **options)


@register_model
def sasa_resnet50_convstem(pretrained: bool = False, **options: Any) -> SASAResNet:
    return _build("sasa_resnet50_convstem", pretrained, depth=50, stem="conv", **options)
