"""What the benchmark runs: whole detectors."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.modeling import fold_batch_norm

from .peers import PEERS
from .timing import Steps
from .workloads import (
    MEMORY_FORMATS,
    WARM_UP_IMAGE,
    Contestant,
    LayerShape,
    Setting,
    backend_for,
    on_cpu,
    serving_backends,
)

# What is done to a detector before it runs.
Prepare = Callable[[nn.Module], nn.Module]


def model_contestants(
    configs: dict[str, CfgNode],
    image_size: int,
    setting: Setting,
    training: bool,
    peers: Iterable[str] = (),
) -> list[Contestant]:
    """The detectors of these configs in both memory formats; the last one by others, too.

    These others are our backends that are not the automatic choice, and the peers.
    """

    def contestant(
        label: str,
        config: CfgNode,
        memory_format: str,
        peer: str | None = None,
        backend: str | None = None,
        prepare: Prepare | None = None,
    ) -> Contestant:
        arguments = (config, image_size, setting, memory_format, training, peer, backend, prepare)
        return Contestant(label, memory_format, partial(build_detector, *arguments), backend)

    contestants = [
        contestant(name, config, memory_format)
        for name, config in configs.items()
        for memory_format in MEMORY_FORMATS
    ]
    prepared: dict[str, Prepare] = {"compiled": compile_networks}
    if not training:
        prepared["norms folded"] = fold_batch_norm
    contestants += [
        contestant(f"{name}, {how}", config, "channels_last", prepare=prepare)
        for how, prepare in prepared.items()
        for name, config in configs.items()
    ]
    name, config = list(configs.items())[-1]
    _, others = serving_backends(LayerShape(256, 256, 80, 80), setting, "contiguous")
    for backend in others:
        label = f"{name} ({backend})"
        contestants.append(contestant(label, config, "contiguous", backend=backend))
    for peer in peers:
        contestants.append(contestant(f"{name}, {peer}", config, "contiguous", peer))
    return contestants


def build_detector(
    config: CfgNode,
    image_size: int,
    setting: Setting,
    memory_format: str,
    training: bool,
    peer: str | None = None,
    backend: str | None = None,
    prepare: Prepare | None = None,
) -> Steps:
    """Inference from images to boxes, or a training step of SGD with momentum."""
    model = build_model(on_cpu(config))
    if peer is not None:
        _replace_attention(model, peer)
    if prepare is not None:
        model = prepare(model)
    model.to(device=setting.device, memory_format=MEMORY_FORMATS[memory_format])
    model.train(training)
    # What is learned does not matter here, but the weights must stay finite.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    images, small = (
        [_example(size) for _ in range(setting.batch)] for size in (image_size, WARM_UP_IMAGE)
    )
    if prepare is compile_networks or (peer is not None and PEERS[peer].compiled):
        small = images  # compiled for this size before all is measured

    def run(batch: list[dict], update: bool) -> None:
        with backend_for(backend), _autocast(setting):
            if not training:
                with torch.no_grad():
                    model(batch)
                return
            with EventStorage():  # RetinaNet logs into it
                loss = sum(model(batch).values())
        with backend_for(backend):
            loss.backward()
        if update:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Steps(partial(run, small, False), partial(run, images, True))


def compile_networks(model: nn.Module) -> nn.Module:
    """The detector, its backbone and its head compiled by torch."""
    for network in map(model.get_submodule, ("backbone", "head")):
        network.compile(fullgraph=True)
    return model


def _replace_attention(model: nn.Module, peer: str) -> None:
    for name, module in list(model.named_modules()):
        if type(module) is LocalSelfAttention2d:
            layer = PEERS[peer].make(
                module.in_channels, module.out_channels, module.kernel_size, module.num_heads
            )
            model.set_submodule(name, layer)


def _example(size: int) -> dict:
    """An image of noise, (3, size, size), with a few boxes, as detectron2's mapper gives it."""
    generator = torch.Generator().manual_seed(0)
    instances = Instances((size, size))
    corners = torch.rand(8, 2, generator=generator) * size / 2
    sides = (0.05 + 0.4 * torch.rand(8, 2, generator=generator)) * size
    instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    instances.gt_classes = torch.arange(8) % 4
    image = torch.randint(0, 256, (3, size, size), generator=generator, dtype=torch.uint8)
    return {"image": image, "instances": instances, "height": size, "width": size}


def _autocast(setting: Setting) -> AbstractContextManager:
    if setting.dtype == "float32":
        return nullcontext()
    return torch.autocast(setting.device, getattr(torch, setting.dtype))
