"""FLOPs and parameters of real models, counted by fvcore."""

from collections import Counter
from typing import Any, NamedTuple

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import Handle, get_shape
from torch import Tensor, nn

from sasa_det.ops.flops import local_attention_flops, stem_attention_flops

# Normalisation, activation, pooling, resampling, sums: not counted, as in the paper's tables.
_NOT_COUNTED = (
    *("aten::batch_norm", "aten::group_norm", "aten::sigmoid", "aten::softmax"),
    *("aten::max_pool2d", "aten::avg_pool2d", "aten::adaptive_avg_pool2d"),
    *("aten::upsample_nearest2d", "aten::add", "aten::add_", "aten::div_", "aten::mul"),
    *("aten::abs", "aten::lt", "aten::where"),
    # Absolute positions and plain values of the stem: the same for every image.
    *("aten::sin", "aten::cos", "aten::pow", "aten::reciprocal", "aten::new_ones"),
)


class ModelCost(NamedTuple):
    """Parameters and FLOPs of a model or a part of it.

    Attributes:
        params (int): trainable or not.
        flops_executed (int): what is computed, a multiply and an add being two; q . r factorised.
        flops_paper (int): the same counted as the paper does, q . r as Eq. 3 is written.
    """

    params: int
    flops_executed: int
    flops_paper: int


class DetectorCost(NamedTuple):
    """A :class:`ModelCost` of the whole and of its parts: stem, stages, "fpn" and "head"."""

    total: ModelCost
    parts: dict[str, ModelCost]


class _DetectorNetwork(nn.Module):
    """What has weights in a dense detector: no normalisation of pixels, anchors and NMS."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.head = model.head
        self.head_in_features = model.head_in_features

    def forward(self, images: Tensor) -> Any:
        features = self.backbone(images)
        return self.head([features[name] for name in self.head_in_features])


def count_detector(model: Any, image_size: int) -> DetectorCost:
    """Counts a detectron2 RetinaNet on one square image of ``image_size`` pixels.

    Raises:
        ValueError: if the model is no dense detector with an FPN.
        RuntimeError: if it runs an operator that nobody said how to count.
    """
    if not hasattr(model, "head") or not hasattr(model.backbone, "bottom_up"):
        raise ValueError(
            f"Counting needs a RetinaNet with an FPN, but the model is a {type(model).__name__}."
        )
    network = _DetectorNetwork(model)
    flops = _count(network, image_size)
    params: Counter[str] = Counter()
    for name, parameter in network.named_parameters():
        prefixes = name.split(".")
        for depth in range(len(prefixes)):
            params[".".join(prefixes[:depth])] += parameter.numel()

    def cost(name: str) -> ModelCost:
        return ModelCost(params[name], *flops[name])

    resnet = "backbone.bottom_up"
    names = ["stem", *model.backbone.bottom_up.stage_names]
    parts = {name: cost(f"{resnet}.{name}") for name in names}
    pairs = zip(cost("backbone"), cost(resnet))
    parts["fpn"] = ModelCost(*(whole - bottom_up for whole, bottom_up in pairs))
    parts["head"] = cost("head")
    return DetectorCost(cost(""), parts)


def count_network(network: nn.Module, image_size: int, in_channels: int = 3) -> ModelCost:
    """Counts any network on one square image of ``image_size`` pixels."""
    params = sum(p.numel() for p in network.parameters())
    return ModelCost(params, *_count(network, image_size, in_channels)[""])


def flop_handles(*, dense: bool) -> dict[str, Handle]:
    """fvcore's handles for this package's operators; as in all of them, a multiply-add is one.

    Args:
        dense (bool): count as the paper does, see :mod:`sasa_det.ops.flops`.

    Example::

        >>> FlopCountAnalysis(model, inputs).set_op_handle(**flop_handles(dense=False)).total()
    """

    def local(inputs: list, outputs: list) -> int:
        kernel_size = inputs[6].toIValue()
        relative = get_shape(inputs[3]) is not None
        shape = get_shape(inputs[0])
        flops = local_attention_flops(shape, kernel_size, relative=relative, dense=dense)
        return flops // 2

    def stem(inputs: list, outputs: list) -> int:
        image, query_weight, mixture = (get_shape(inputs[i]) for i in (0, 1, 4))
        relative = get_shape(inputs[5]) is not None
        flops = stem_attention_flops(image, query_weight, mixture, relative=relative, dense=dense)
        return flops // 2

    return {
        "sasa_det::local_attention": local,
        "sasa_det::stem_attention": stem,
        "sasa_det::stem_attention_pooled": stem,
    }


def _count(network: nn.Module, image_size: int, in_channels: int = 3) -> dict[str, tuple[int, int]]:
    """(executed, paper) of each module, by its name."""
    device = next(network.parameters()).device
    images = torch.zeros(1, in_channels, image_size, image_size, device=device)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        executed, paper = (_analyse(network, images, dense=dense) for dense in (False, True))
    finally:
        for module, training in modes.items():
            module.training = training
    return {name: (flops, paper[name]) for name, flops in executed.items()}


def _analyse(network: nn.Module, images: Tensor, *, dense: bool) -> Counter[str]:
    """FLOPs of each module, a multiply and an add being two."""
    analysis = FlopCountAnalysis(network, (images,))
    # Not None: fvcore would go on using its own handle where it has one.
    analysis.set_op_handle(**dict.fromkeys(_NOT_COUNTED, _count_nothing))
    analysis.set_op_handle(**flop_handles(dense=dense))
    analysis.uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    with torch.no_grad():
        multiply_adds = analysis.by_module()
    if analysis.unsupported_ops():
        names = ", ".join(analysis.unsupported_ops())
        raise RuntimeError(
            f"The network runs operators that would go uncounted: {names}; add them to "
            "sasa_det/analysis/flops.py, with a handle or among those not counted."
        )
    return Counter({name: int(2 * count) for name, count in multiply_adds.items()})


def _count_nothing(inputs: list, outputs: list) -> int:
    return 0
