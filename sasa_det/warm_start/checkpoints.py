"""Reads convolutional checkpoints of several makers, under detectron2's names."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_basic_c2_names
from torch import Tensor

from sasa_det.weight_files import read_weights

# Of detectron2's norms, and torch's.
_EPS = 1e-5


class Pixels(NamedTuple):
    """What a network takes in: (pixel - mean) / std of pixels in [0, 255], in this order."""

    format: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


TORCHVISION_PIXELS = Pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
MSRA_PIXELS = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


@dataclasses.dataclass
class Source:
    """A convolutional ResNet, or a detector with one, out of a checkpoint.

    Attributes:
        tensors (dict[str, Tensor]): under detectron2's names; those of the ResNet start at
            "stem" or "res2", those of the other parts at "backbone", "head" and so on.
        kind (str): what the file is, in words.
        pixels (Pixels or None): what it takes in; None for one that does not say, as ours.
        stride_in_1x1 (bool or None): where its stages downsample; None for one that does not say.
    """

    tensors: dict[str, Tensor]
    kind: str
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None

    def resnet(self) -> "Source":
        """The ResNet alone."""
        tensors = {name: t for name, t in self.tensors.items() if is_resnet_name(name)}
        return dataclasses.replace(self, tensors=tensors)

    def has_folded_norms(self) -> bool:
        """Whether its batch norms are mere scale and shift, without statistics, as MSRA's."""
        # Not the stem's, which takes up a bias.
        mean = self.tensors.get("res2.0.conv1.norm.running_mean")
        return mean is not None and not mean.any()


def read_checkpoint(path: str) -> Source:
    """Reads torchvision's (.pth, .safetensors) and detectron2's (.pkl, .pth, .safetensors) files.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file that holds no convolutional ResNet of bottlenecks, or more than
            tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path!r} does not exist.")
    content = read_weights(path)
    author = content.get("__author__") if isinstance(content, Mapping) else None
    raw = _tensors(content)
    if "conv1_w" in raw:
        names = convert_basic_c2_names(list(raw))
        tensors = _with_statistics(dict(zip(names, raw.values())))
        return Source(tensors, "a ResNet of MSRA", MSRA_PIXELS, stride_in_1x1=True)
    root = _root(raw, r"layer1\.0\.conv1\.weight")
    if root is not None:
        tensors = _without(raw, root)
        tensors = {_from_torchvision(name): tensor for name, tensor in tensors.items()}
        return Source(tensors, "a ResNet of torchvision", TORCHVISION_PIXELS, stride_in_1x1=False)
    root = _root(raw, r"res2\.0\.conv1\.weight")
    if root is None:
        raise ValueError(
            f"The checkpoint {path!r} holds no ResNet of bottlenecks: neither torchvision's "
            "layer1.0.conv1.weight nor detectron2's res2.0.conv1.weight is in it."
        )
    tensors = _without(raw, root)
    if not any(name.endswith(".conv2.weight") for name in tensors):
        raise ValueError(
            f"The ResNet of {path!r} has no 3x3 convolutions; if it is one of this package, "
            "MODEL.WEIGHTS takes it as it is."
        )
    if author == "torchvision":
        kind = "a ResNet of torchvision in detectron2's format"
        return Source(tensors, kind, TORCHVISION_PIXELS, stride_in_1x1=False)
    if author == "Detectron2 Model Zoo":
        return Source(tensors, "a detector of detectron2's zoo", MSRA_PIXELS, stride_in_1x1=True)
    return Source(tensors, "a model of detectron2")


def is_resnet_name(name: str) -> bool:
    """Whether a name of ``Source.tensors`` is of the ResNet."""
    return re.match(r"(stem|res\d)\.", name) is not None


def _tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of a state dict, alone or among other things; floating ones in float32."""
    for key in ("model", "state_dict", "blobs"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape))
        if isinstance(name, str) and isinstance(value, Tensor):
            name = name.removeprefix("module.")
            tensors[name] = value.float() if value.is_floating_point() else value
    return tensors


def _root(tensors: Mapping[str, Tensor], first_layer: str) -> str | None:
    """What precedes the names of the ResNet."""
    for name in tensors:
        match = re.fullmatch(rf"((?:.*\.)?){first_layer}", name)
        if match:
            return match[1]
    return None


def _without(tensors: Mapping[str, Tensor], root: str) -> dict[str, Tensor]:
    return {name.removeprefix(root): tensor for name, tensor in tensors.items()}


def _from_torchvision(name: str) -> str:
    name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    name = re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    name = re.sub(r"^conv1\.", "stem.conv1.", name)
    return re.sub(r"^fc\.", "linear.", name)


def _with_statistics(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale and shift as a batch norm whose statistics change nothing but the stem's bias."""
    result = dict(tensors)
    bias = result.pop("stem.conv1.bias", None)
    for name, tensor in tensors.items():
        if name.endswith(".norm.weight"):
            prefix = name.removesuffix("weight")
            result.setdefault(f"{prefix}running_mean", torch.zeros_like(tensor))
            result.setdefault(f"{prefix}running_var", torch.full_like(tensor, 1 - _EPS))
    if bias is not None:
        result["stem.conv1.norm.running_mean"] -= bias
    return result
