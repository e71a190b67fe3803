"""What can be known of a checkpoint before a model starts from it."""

import logging
import pickle
import re
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from sasa_det.config import STAGES

SHOWN_MISMATCHES = 3


def check_weights(path: str, cfg: CfgNode) -> None:
    """Checks that the ResNet of a checkpoint has the depth and the width of the config's.

    detectron2 leaves out what does not fit, with a warning for each, and trains half a backbone
    from random weights. Tensors of other names may be missing or left over: another stem or head,
    stages that attend instead. Only local .pth files are looked into.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with the first three mismatches.
    """
    if path and "://" not in path and not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path!r} of MODEL.WEIGHTS does not exist.")
    tensors = _read_tensors(path)
    if tensors is None:
        return
    theirs = _shapes(tensors)
    with torch.device("meta"):
        ours = _shapes(build_backbone(cfg).state_dict())
    mismatches = [
        shape_mismatch(name, theirs[name], shape)
        for name, shape in ours.items()
        if theirs.get(name, shape) != shape
    ]
    for blocks, others, where in (
        (_blocks(theirs), _blocks(ours), "the model"),
        (_blocks(ours), _blocks(theirs), "the checkpoint"),
    ):
        stages = {block.split(".")[0] for block in others}
        missing = [b for b in blocks if b not in others and b.split(".")[0] in stages]
        mismatches += [f"{block} is not in {where}" for block in missing]
    if mismatches:
        raise ValueError(
            f"The checkpoint {path!r} of MODEL.WEIGHTS is of another depth, width or window than "
            f"the config's backbone: {'; '.join(mismatches[:SHOWN_MISMATCHES])}; set "
            "MODEL.RESNETS and MODEL.SASA to what it was trained with."
        )


def warn_of_frozen_random_weights(cfg: CfgNode) -> None:
    """Warns, in detectron2's log, of a backbone whose frozen layers no checkpoint fills.

    detectron2's defaults freeze two stages and, in its own configs, all norms: right for the
    weights of ImageNet that come with them. Such a training from random weights ends at an AP of
    about zero, without an error.
    """
    weights = cfg.MODEL.WEIGHTS
    if weights and not _is_convolutional(weights):
        return
    sasa, freeze_at = cfg.MODEL.SASA, cfg.MODEL.BACKBONE.FREEZE_AT
    parts = ("stem", *STAGES)
    attentional = {"stem"} if sasa.STEM == "attention" else set()
    attentional |= set(sasa.ATTENTION_STAGES)
    random = attentional if weights else set(parts)
    causes = []
    if random & set(parts[:freeze_at]):
        causes.append(f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}")
    if random and cfg.MODEL.RESNETS.NORM == "FrozenBN":
        causes.append("MODEL.RESNETS.NORM is FrozenBN")
    if causes:
        logging.getLogger("detectron2").warning(
            "%s, but MODEL.WEIGHTS is %s: what is frozen stays as it was drawn at random, and the "
            "AP near zero; set MODEL.BACKBONE.FREEZE_AT to 0 and MODEL.RESNETS.NORM to SyncBN, or "
            "MODEL.WEIGHTS to a checkpoint of this backbone.",
            " and ".join(causes),
            f"{weights!r}, a model without attention" if weights else "empty",
        )


def _is_convolutional(weights: str) -> bool:
    """Whether a checkpoint is known to have no attention."""
    if weights.endswith(".pkl"):  # as detectron2's models come
        return True
    tensors = _read_tensors(weights) if Path(weights).is_file() else None
    return tensors is not None and not any(".attention." in name for name in tensors)


def _read_tensors(path: str) -> dict[str, torch.Tensor] | None:
    """The tensors of a .pth file by name; None where they cannot be known."""
    if "://" in path or not path.endswith(".pth"):
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (EOFError, pickle.UnpicklingError, RuntimeError):
        return None  # which detectron2 will say more about
    tensors = content.get("model", content)
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Of the ResNet, whatever stands before its names."""
    found = {}
    for name, tensor in tensors.items():
        match = re.search(r"(?:^|\.)((?:stem|res\d)\..+)$", name)
        if match:
            found[match[1]] = tensor.shape
    return found


def _blocks(shapes: dict[str, torch.Size]) -> list[str]:
    """Such as res2.0, each once."""
    matches = (re.match(r"res\d\.\d+", name) for name in shapes)
    return list(dict.fromkeys(match[0] for match in matches if match))


def shape_mismatch(name: str, theirs: torch.Size, ours: torch.Size) -> str:
    """Of a tensor in a checkpoint and in the model, in words."""
    there, here = ("x".join(map(str, shape)) or "a number" for shape in (theirs, ours))
    return f"{name} is {there} there and {here} in the model"
