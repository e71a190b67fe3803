"""What the benchmark runs: layers and stems, by every implementation."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import available_backends, use_backend
from sasa_det.ops.backends import choose
from sasa_det.ops.calls import AttentionCall

from .peers import PEERS
from .timing import Build, Steps

CONVOLUTION = "3x3 convolution"
OURS = "sasa_det"
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# The sides of what only loads and compiles.
WARM_UP_MAP, WARM_UP_IMAGE = 16, 64


class Setting(NamedTuple):
    """What all contestants of a comparison share."""

    device: str = "cpu"
    dtype: str = "float32"
    batch: int = 1


class LayerShape(NamedTuple):
    """An attention layer and the map that it meets.

    Attributes:
        stride (int): of the convolution that it replaces; attention is pooled to it afterwards.
    """

    in_channels: int
    out_channels: int
    height: int
    width: int
    kernel_size: int = 7
    num_heads: int = 8
    stride: int = 1

    def __str__(self) -> str:
        channels = f"{self.in_channels}"
        if self.out_channels != self.in_channels:
            channels += f" to {self.out_channels}"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return (
            f"{channels} channels, {self.height}x{self.width}, k = {self.kernel_size}, "
            f"{self.num_heads} heads{stride}"
        )


class Contestant(NamedTuple):
    """One row of a comparison.

    Attributes:
        implementation (str): its name.
        memory_format (str): "contiguous" or "channels_last".
        build: builds it, to be run.
        backend (str or None): the backend that serves it, where it is ours.
    """

    implementation: str
    memory_format: str
    build: Build
    backend: str | None = None


def attention_shapes(config: CfgNode, image_size: int) -> dict[LayerShape, list[str]]:
    """The shapes of a detector's attention layers, found by running it on a square image.

    Returns:
        dict[LayerShape, list[str]]: with each, the names of the layers that have it; a layer
        that meets several levels of the FPN stands under each of them.
    """
    shapes: dict[LayerShape, list[str]] = {}

    def record(name: str, stride: int, layer: Any, inputs: tuple, output: Tensor) -> None:
        height, width = inputs[0].shape[-2:]
        channels = (layer.in_channels, layer.out_channels)
        shape = LayerShape(*channels, height, width, layer.kernel_size, layer.num_heads, stride)
        shapes.setdefault(shape, []).append(name)

    # On "meta" shapes are computed and nothing else.
    model = build_model(on_cpu(config)).eval().to("meta")
    for name, module in model.named_modules():
        if isinstance(module, LocalSelfAttention2d):
            stride = getattr(model.get_submodule(name.rpartition(".")[0]), "stride", 1)
            module.register_forward_hook(partial(record, name, stride))
    with torch.no_grad():
        features = model.backbone(torch.zeros(1, 3, image_size, image_size, device="meta"))
        model.head([features[name] for name in model.head_in_features])
    return shapes


def layer_contestants(
    shape: LayerShape,
    setting: Setting,
    training: bool,
    peers: Iterable[str] = (),
    memory_formats: Iterable[str] = tuple(MEMORY_FORMATS),
) -> list[Contestant]:
    """The convolution, ours by each backend, and these peers, each in these memory formats."""
    contestants = []
    for memory_format in memory_formats:
        automatic, others = serving_backends(shape, setting, memory_format)
        backends = {CONVOLUTION: None, OURS: automatic}
        backends.update({f"{OURS} ({name})": name for name in others})
        backends.update(dict.fromkeys(peers))
        for implementation, backend in backends.items():
            forced_backend = None if implementation == OURS else backend
            build = partial(
                build_layer,
                implementation,
                shape,
                setting,
                memory_format,
                training,
                forced_backend,
            )
            contestants.append(Contestant(implementation, memory_format, build, backend))
    return contestants


def stem_contestants(
    configs: dict[str, CfgNode], image_size: int, setting: Setting, training: bool
) -> list[Contestant]:
    """The stems of these configs, by implementation, with norm and pooling."""
    return [
        Contestant(
            name,
            memory_format,
            partial(build_stem, config, image_size, setting, memory_format, training),
        )
        for memory_format in MEMORY_FORMATS
        for name, config in configs.items()
    ]


def build_layer(
    implementation: str,
    shape: LayerShape,
    setting: Setting,
    memory_format: str,
    training: bool,
    backend: str | None = None,
) -> Steps:
    """A layer with its projections; a training step takes the gradients of input and weights."""
    layer = make_layer(implementation, shape)
    peer = PEERS.get(implementation)
    sizes = [(WARM_UP_MAP, WARM_UP_MAP), (shape.height, shape.width)]
    inputs = [
        torch.randn(setting.batch, shape.in_channels, *size, requires_grad=training)
        for size in sizes
    ]
    of_outputs = (shape.out_channels, shape.stride)
    steps = _module_steps(layer, inputs, *of_outputs, setting, memory_format, training, backend)
    if peer is not None and peer.compiled:
        return Steps(steps.step, steps.step)  # compiled for this shape before all is measured
    return steps


def build_stem(
    config: CfgNode, image_size: int, setting: Setting, memory_format: str, training: bool
) -> Steps:
    """The stem of a config's ResNet; the image gets no gradient."""
    stem = build_model(on_cpu(config)).backbone.bottom_up.stem
    images = [torch.randn(setting.batch, 3, size, size) for size in (WARM_UP_IMAGE, image_size)]
    of_outputs = (stem.out_channels, stem.stride)
    return _module_steps(stem, images, *of_outputs, setting, memory_format, training)


def make_layer(implementation: str, shape: LayerShape) -> nn.Module:
    """The convolution, our attention (any name that is no peer's) or a peer."""
    c_in, c_out = shape.in_channels, shape.out_channels
    if implementation == CONVOLUTION:
        return nn.Conv2d(c_in, c_out, 3, stride=shape.stride, padding=1, bias=False)
    peer = PEERS.get(implementation)
    make = LocalSelfAttention2d if peer is None else peer.make
    layer = make(c_in, c_out, shape.kernel_size, shape.num_heads)
    if shape.stride == 1:
        return layer
    pool = nn.AvgPool2d(shape.stride, shape.stride, ceil_mode=True)
    return nn.Sequential(layer, pool)


def serving_backends(
    shape: LayerShape, setting: Setting, memory_format: str
) -> tuple[str | None, list[str]]:
    """The backend that is chosen for such a layer automatically, and the others that serve it."""
    channels = shape.out_channels
    dtype = getattr(torch, setting.dtype)
    projected = torch.empty(
        (setting.batch, 3 * channels, shape.height, shape.width),
        dtype=dtype,
        device=setting.device,
        memory_format=MEMORY_FORMATS[memory_format],
    )
    embeddings = torch.empty(
        (shape.num_heads, shape.kernel_size, channels // shape.num_heads // 2),
        dtype=dtype,
        device=setting.device,
    )
    query, key, value = projected.chunk(3, dim=1)
    call = AttentionCall(
        query, key, value, embeddings, embeddings, shape.num_heads, shape.kernel_size
    )
    chosen = choose("local_attention", call)
    automatic, others = None, []
    for name, missing in available_backends().items():
        if missing is not None:
            continue
        try:
            with use_backend(name):
                implementation = choose("local_attention", call)
        except RuntimeError:  # it refuses
            continue
        if implementation is chosen:
            automatic = name
        else:
            others.append(name)
    return automatic, others


def _module_steps(
    module: nn.Module,
    inputs: list[Tensor],
    out_channels: int,
    stride: int,
    setting: Setting,
    memory_format: str,
    training: bool,
    backend: str | None = None,
) -> Steps:
    """Of a module whose outputs have these channels and this stride: a step for each input."""
    module = _place(module, setting, memory_format).train(training)
    steps = []
    for x in inputs:
        height, width = (-(-size // stride) for size in x.shape[2:])
        leaf = _place(x.detach(), setting, memory_format).requires_grad_(x.requires_grad)
        ones = torch.ones(len(x), out_channels, height, width)
        grad = _place(ones, setting, memory_format) if training else None
        steps.append(partial(_run_module, module, backend, leaf, grad))
    return Steps(*steps)


def _run_module(module: nn.Module, backend: str | None, x: Tensor, grad: Tensor | None) -> None:
    """Inference, or a training step where the gradient of the output is given."""
    with backend_for(backend):
        if grad is None:
            with torch.no_grad():
                module(x)
            return
        leaves = [t for t in (x, *module.parameters()) if t.requires_grad]
        torch.autograd.grad(module(x), leaves, grad)


def on_cpu(config: CfgNode) -> CfgNode:
    """Built on the CPU, and moved afterwards; random weights must not detect anything."""
    config = config.clone()
    config.defrost()
    config.MODEL.DEVICE = "cpu"
    # How many boxes random weights find differs by chance, and with it the time to sort them.
    config.MODEL.RETINANET.SCORE_THRESH_TEST = 1.0
    return config


def _place(x: Any, setting: Setting, memory_format: str) -> Any:
    dtype = getattr(torch, setting.dtype)
    return x.to(device=setting.device, dtype=dtype, memory_format=MEMORY_FORMATS[memory_format])


def backend_for(name: str | None) -> AbstractContextManager:
    return nullcontext() if name is None else use_backend(name)
