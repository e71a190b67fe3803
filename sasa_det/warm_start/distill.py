"""Fits each attention layer to the convolution whose place it takes."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.modeling import (
    AttentionBottleneckBlock,
    AttentionFPN,
    AttentionRetinaNetHead,
    AttentionStem,
)
from sasa_det.modeling.norm import is_batch_norm

from .checkpoints import Source
from .images import image_loaders
from .norms import MEASURED_IMAGES, with_measured_statistics
from .teacher import build_teacher

_LEARNING_RATE = 5e-3
_LOGGED_STEPS = 10


class LayerError(NamedTuple):
    """Squared error of a layer on unseen images, relative to the variance of its target.

    One is the error of a layer that knows each channel's mean, and nothing of the image.
    """

    name: str
    before: float
    after: float


def distill(
    model: nn.Module,
    source: Source,
    cfg: CfgNode,
    images: list[str],
    *,
    steps: int = 1000,
    batch_size: int = 4,
) -> list[LayerError]:
    """Fits the model's attention, layer by layer, to the convolutions of the checkpoint.

    Each layer gets what the convolution gets in the convolutional model, the teacher, and is to
    give what the convolution gives there; so the layers do not depend on one another, and one pass
    of the teacher serves them all. In a bottleneck the outputs are compared behind pooling and
    norm, where the next convolution reads them; the norm is not fitted. The attention stem is
    compared as a whole, its norm fitted with it. FPN and head take part if the checkpoint has them.

    Args:
        model (nn.Module): filled by :func:`convert`; fitted in place.
        source (Source): the checkpoint that filled it.
        cfg (CfgNode): what the model was built from; images are scaled and cut as it says.
        images (list[str]): files, without annotations. One in ten, 32 at most, only measures.
        steps (int): of Adam, its learning rate falling from 5e-3 by a cosine.
        batch_size (int): images a step.

    Returns:
        list[LayerError]: of the layers that were fitted, by the model's names.

    Raises:
        ValueError: if the model has no attention where the checkpoint has convolutions.
    """
    teacher: Any
    teacher, known = build_teacher(source, cfg)
    layers = [layer for layer in _layers(model, teacher) if layer.teacher_name in known]
    if not layers:
        raise ValueError("The model has no attention that the checkpoint could teach.")
    training, testing = image_loaders(cfg, images, batch_size)
    model.eval()
    before = _measure(teacher, layers, testing)
    for layer in layers:
        _start(layer)
    _fit(teacher, layers, training, steps)
    for layer in layers:
        if isinstance(layer.fitted, AttentionStem) and is_batch_norm(layer.fitted.norm):
            # Fitted as a mere scale and shift: as training needs it, it is the same function.
            batches = itertools.islice(training, -(-MEASURED_IMAGES // batch_size))
            inputs = (teacher.preprocess_image(batch).tensor for batch in batches)
            norms: dict[str, Any] = {"norm": layer.fitted.norm}
            measured = with_measured_statistics(norms, layer.fitted, inputs)["norm"]
            norms["norm"].load_state_dict(measured, strict=False)
    after = _measure(teacher, layers, testing)
    return [LayerError(layer.name, *pair) for layer, *pair in zip(layers, before, after)]


@dataclasses.dataclass
class _Layer:
    """A layer of the model and the one of the teacher whose place it takes."""

    name: str
    fitted: nn.Module
    forward: Callable[[Tensor], Tensor]
    teacher_name: str
    teacher: nn.Module
    # What follows the teacher's layer and has no counterpart of its own.
    teacher_norm: nn.Module | None = None
    # Whose output our layer gets where the teacher's gets the ReLU of it; else the same input.
    input_from: nn.Module | None = None
    residual: bool = False
    target_variance: float = 1.0


def _layers(model: nn.Module, teacher: nn.Module) -> Iterator[_Layer]:
    for name, module in model.named_modules():
        if isinstance(module, AttentionStem):
            yield _pair(name, module, name, teacher)
        elif isinstance(module, AttentionBottleneckBlock):
            attention, conv = f"{name}.attention", f"{name}.conv2"
            layer = _Layer(
                attention, module.attention, module.attend, conv, teacher.get_submodule(conv)
            )
            layer.residual = module.residual
            yield layer
        elif isinstance(module, AttentionFPN):
            for child, layer in module.named_children():
                if isinstance(layer, PreActivationSelfAttention2d):
                    yield _pair(f"{name}.{child}", layer, f"{name}.{child}", teacher)
        elif isinstance(module, AttentionRetinaNetHead):
            yield from _head_layers(name, module, teacher)


def _head_layers(name: str, head: Any, teacher: Any) -> Iterator[_Layer]:
    for tower, predictor in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
        theirs = list(teacher.get_submodule(f"{name}.{tower}"))
        convs = [i for i, layer in enumerate(theirs) if isinstance(layer, nn.Conv2d)]
        input_from = None
        for index, conv in enumerate(convs):
            full = f"{name}.{tower}"
            layer = getattr(head, tower)[index]
            pair = _pair(f"{full}.{index}", layer, f"{full}.{conv}", teacher)
            if not isinstance(theirs[conv + 1], nn.ReLU):
                pair.teacher_norm = theirs[conv + 1]
            pair.input_from = input_from
            input_from = theirs[conv] if pair.teacher_norm is None else pair.teacher_norm
            yield pair
        full = f"{name}.{predictor}"
        pair = _pair(full, getattr(head, predictor), full, teacher)
        pair.input_from = input_from
        yield pair


def _pair(name: str, module: nn.Module, teacher_name: str, teacher: nn.Module) -> _Layer:
    return _Layer(name, module, module, teacher_name, teacher.get_submodule(teacher_name))


@torch.no_grad()
def _measure(teacher: nn.Module, layers: list[_Layer], loader: Iterable[list[dict]]) -> list[float]:
    """The relative error of each layer; leaves the variance of its target in it."""
    sums: dict[str, list[Tensor]] = {}

    def add(layer: _Layer, x: Tensor, target: Tensor) -> None:
        error = (layer.forward(x) - target).double().square().sum()
        target = target.double().transpose(0, 1).flatten(1)
        count = error.new_tensor(target.shape[1])
        terms = [error, count, target.sum(dim=1), target.square().sum(dim=1)]
        if layer.name in sums:
            terms = [a + b for a, b in zip(sums[layer.name], terms)]
        sums[layer.name] = terms

    with _hooked(layers, add):
        for batch in loader:
            _run(teacher, batch, layers)
    errors = []
    for layer in layers:
        error, count, total, square_total = sums[layer.name]
        deviation = (square_total - total.square() / count).sum().clamp(min=1e-12)
        layer.target_variance = float(deviation / count / len(total))
        errors.append(float(error / deviation))
    return errors


@torch.no_grad()
def _start(layer: _Layer) -> None:
    """What can be known without a step of descent."""
    ours: Any = layer.fitted
    theirs: Any = layer.teacher
    if isinstance(ours, LocalSelfAttention2d) and theirs.groups == 1:
        # Values as the convolution makes them of a constant map: the sum over its window.
        value = theirs.weight.sum(dim=(2, 3), keepdim=True)
        if layer.residual:
            value = value - torch.eye(len(value)).to(value)[..., None, None]
        ours.projection.weight[-ours.out_channels :] = value


def _fit(
    teacher: nn.Module, layers: list[_Layer], loader: Iterable[list[dict]], steps: int
) -> None:
    parameters = [p for layer in layers for p in layer.fitted.parameters()]
    frozen = [p.requires_grad_() for p in parameters if not p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, steps))
    losses: dict[str, float] = {}

    def descend(layer: _Layer, x: Tensor, target: Tensor) -> None:
        with torch.enable_grad():
            error = (layer.forward(x) - target).square().mean() / layer.target_variance
            error.backward()
        losses[layer.name] = float(error.detach())

    with _hooked(layers, descend):
        for step, batch in zip(range(1, steps + 1), loader):
            optimizer.zero_grad()
            with torch.no_grad():
                _run(teacher, batch, layers)
            optimizer.step()
            schedule.step()
            if step % max(1, steps // _LOGGED_STEPS) == 0:
                mean = sum(losses.values()) / len(losses)
                message = "Step %d of %d: relative error %.3f, the mean of %d layers"
                logging.getLogger(__name__).info(message, step, steps, mean, len(losses))
    for parameter in frozen:
        parameter.requires_grad_(False)


@contextmanager
def _hooked(layers: list[_Layer], use: Callable[[_Layer, Tensor, Tensor], None]) -> Iterator[None]:
    """Gives ``use`` input and output of the teacher's layers as they are computed."""

    latest: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        latest[module] = output

    def hook(layer: _Layer) -> Callable:
        def look(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            x = inputs[0] if layer.input_from is None else latest[layer.input_from]
            use(layer, x, output if layer.teacher_norm is None else layer.teacher_norm(output))

        return look

    sources = {layer.input_from for layer in layers if layer.input_from is not None}
    handles = [module.register_forward_hook(keep) for module in sources]
    handles += [layer.teacher.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(teacher: Any, batch: list[dict], layers: list[_Layer]) -> None:
    """As far into the teacher as the layers need."""
    features = teacher.backbone(teacher.preprocess_image(batch).tensor)
    if any(layer.teacher_name.startswith("head.") for layer in layers):
        teacher.head([features[name] for name in teacher.head_in_features])
