"""Fills every layer of a model that has a counterpart in a convolutional checkpoint."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock
from tabulate import tabulate
from torch import Tensor, nn

from sasa_det.checkpoint import SHOWN_MISMATCHES, shape_mismatch
from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.modeling import AttentionBottleneckBlock, AttentionStem

from .checkpoints import Pixels, Source, is_resnet_name


@dataclasses.dataclass
class Conversion:
    """What became of each tensor.

    Attributes:
        filled (list[str]): the model's names of what came from the checkpoint.
        new (list[str]): the model's names of what has no counterpart.
        unused (list[str]): what the model has no place for, as the model would name it.
        fitted (list[str]): the model's names of what was new and is fitted by distillation.
    """

    filled: list[str]
    new: list[str]
    unused: list[str]
    fitted: list[str] = dataclasses.field(default_factory=list)

    def fit(self, modules: Iterable[str]) -> None:
        """Moves what these modules hold from ``new`` to ``fitted``."""
        prefixes = tuple(f"{name}." for name in modules)
        self.fitted += [name for name in self.new if name.startswith(prefixes)]
        self.new = [name for name in self.new if not name.startswith(prefixes)]

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """What is worth keeping of the model: all that is not new."""
        state = model.state_dict()
        return {name: state[name] for name in [*self.filled, *self.fitted]}

    def table(self) -> str:
        """Number and layers of the tensors, by part of the model."""
        columns = {"filled": self.filled, "fitted": self.fitted, "new": self.new}
        columns["unused"] = self.unused
        if not self.fitted:
            del columns["fitted"]
        cells: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for column, names in columns.items():
            for name in names:
                part, layer = _part_and_layer(name)
                cells[part][column].append(layer)
        rows = [
            [part, *(_summary(cells[part][column]) for column in columns)] for part in sorted(cells)
        ]
        return tabulate(rows, ["tensors", *columns], disable_numparse=True)


@torch.no_grad()
def convert(model: nn.Module, source: Source, cfg: CfgNode) -> Conversion:
    """Fills the model, in place, with what the checkpoint has under the same name and meaning.

    The norm behind a bottleneck's attention takes the place of the one behind the 3x3 convolution.
    A convolutional stem is changed to take in pixels as the config gives them: exactly, except
    beside the border where the means differ. An attention stem, each attention and what was made
    for it in FPN and head have no counterpart.

    Args:
        model (nn.Module): of detectron2, with a ResNet of bottlenecks in it.
        source (Source): from :func:`read_checkpoint`.
        cfg (CfgNode): what the model was built from.

    Raises:
        ValueError: for a tensor that should fit and does not.
    """
    _check_strides(model, source)
    root = resnet_root(model)
    theirs = {
        root + name if is_resnet_name(name) else name: tensor
        for name, tensor in _for_pixels(source, cfg).items()
    }
    state = model.state_dict()
    attention = _attention_prefixes(model)
    filled: dict[str, str] = {}
    mismatches = []
    for name, tensor in state.items():
        their_name = name.replace(".attention_norm.", ".conv2.norm.")
        if name.startswith(attention) or _is_other_norm(name, state, their_name, theirs):
            continue
        if their_name not in theirs:
            if name.startswith(root) and not name.endswith("num_batches_tracked"):
                mismatches.append(f"{name} is not in the checkpoint")
        elif theirs[their_name].shape != tensor.shape:
            mismatches.append(shape_mismatch(name, theirs[their_name].shape, tensor.shape))
        else:
            filled[name] = their_name
    used = set(filled.values())
    unused = [name for name in theirs if name not in used]
    mismatches += [
        f"{name} is not in the model"
        for name in unused
        if name not in state and _has_a_place(name, root, model)
    ]
    _check(mismatches)
    for name, their_name in filled.items():
        state[name].copy_(theirs[their_name])
    return Conversion(list(filled), [name for name in state if name not in filled], unused)


def resnet_root(model: nn.Module) -> str:
    """What precedes the names of the model's ResNet, a dot at its end.

    Raises:
        ValueError: if it has none.
    """
    for name, module in model.named_modules():
        if isinstance(module, ResNet):
            return f"{name}." if name else ""
    raise ValueError("The model of the config has no ResNet: see MODEL.BACKBONE.NAME.")


def _check(mismatches: list[str]) -> None:
    if mismatches:
        shown = "; ".join(mismatches[:SHOWN_MISMATCHES])
        rest = len(mismatches) - SHOWN_MISMATCHES
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"The checkpoint is of another depth, width, norm or head than the config: {shown}"
            f"{more}."
        )


def _check_strides(model: nn.Module, source: Source) -> None:
    if source.stride_in_1x1 is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, BottleneckBlock) and module.stride > 1:
            in_1x1 = module.conv1.stride != (1, 1)
            if in_1x1 != source.stride_in_1x1:
                where = "1x1" if source.stride_in_1x1 else "3x3"
                raise ValueError(
                    f"The checkpoint ({source.kind}) downsamples in its {where} convolutions, the "
                    f"convolutional block {name} elsewhere; add MODEL.RESNETS.STRIDE_IN_1X1 "
                    f"{source.stride_in_1x1}."
                )


def _for_pixels(source: Source, cfg: CfgNode) -> dict[str, Tensor]:
    """The source's tensors, its first convolution made for the pixels of the config."""
    tensors = dict(source.tensors)
    weight = tensors.get("stem.conv1.weight")
    if source.pixels is None or weight is None or weight.shape[1] != 3:
        return tensors
    ours = Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))
    if sorted(ours.format) != sorted(source.pixels.format):
        raise ValueError(
            f"INPUT.FORMAT is {ours.format!r}, but the checkpoint takes in "
            f"{source.pixels.format!r}; set it to BGR or RGB."
        )
    swap = ours.format != source.pixels.format
    their_mean, their_std = (torch.tensor(values) for values in source.pixels[1:])
    mean, std = (torch.tensor(values[::-1] if swap else values) for values in ours[1:])
    by_channel = (1, 3, 1, 1)
    offset = (weight * ((mean - their_mean) / their_std).view(by_channel)).sum(dim=(1, 2, 3))
    weight = weight * (std / their_std).view(by_channel)
    tensors["stem.conv1.weight"] = weight.flip(1) if swap else weight
    statistic = "stem.conv1.norm.running_mean"
    if offset.any() and statistic in tensors:
        tensors[statistic] = tensors[statistic] - offset
    return tensors


def _attention_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What precedes the names of tensors that serve attention, whatever else bears such a name."""
    kinds = (LocalSelfAttention2d, PreActivationSelfAttention2d, AttentionStem)
    return tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))


def _is_other_norm(name: str, ours: dict, their_name: str, theirs: dict) -> bool:
    """Whether one of two norms outside the ResNet keeps statistics and the other does not."""
    if not re.search(r"\.norm\.(weight|bias)$", name) or ".bottom_up." in name:
        return False
    statistic = "running_mean"
    return (f"{name.rpartition('.')[0]}.{statistic}" in ours) != (
        f"{their_name.rpartition('.')[0]}.{statistic}" in theirs
    )


def _has_a_place(name: str, root: str, model: nn.Module) -> bool:
    """Whether a tensor of the checkpoint's ResNet should have a counterpart in the model's."""
    if not name.startswith(root) or name.endswith("num_batches_tracked"):
        return False
    part, *layer = name.removeprefix(root).split(".")
    stage = getattr(model.get_submodule(root[:-1]), part, None)
    if stage is None or part == "stem":  # a stage that nobody reads is not built
        return stage is not None and not isinstance(stage, AttentionStem)
    index = int(layer[0])
    if index >= len(stage):
        return True
    return not (isinstance(stage[index], AttentionBottleneckBlock) and layer[1] == "conv2")


def _part_and_layer(name: str) -> tuple[str, str]:
    """Such as backbone.bottom_up.res2 and conv1; layers are named in the ResNet only."""
    match = re.match(r"(.*?\b(?:stem|res\d))\.(?:\d+\.)?(\w+)", name)
    if match:
        return match[1], match[2]
    return ".".join(part.rstrip("0123456789") for part in name.split(".")[:2]), ""


def _summary(layers: list[str]) -> str:
    if not layers:
        return ""
    names = ", ".join(sorted(set(filter(None, layers))))
    return f"{len(layers)} ({names})" if names else str(len(layers))
