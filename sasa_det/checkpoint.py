"""What can be known of a checkpoint before a model starts from it."""

import re

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone

from sasa_det.weight_files import SAFETENSORS, read_weights

SHOWN_MISMATCHES = 3


def check_weights(path: str, cfg: CfgNode) -> None:
    """Checks that the ResNet of a checkpoint has the depth and the width of the config's.

    detectron2 leaves out what does not fit, with a warning for each, and trains half a backbone
    from random weights. Tensors of other names may be missing or left over: another stem or head,
    stages that attend instead. Only local files are looked into, of pickles only whether they are
    to be trusted.

    Raises:
        ValueError: with the first three mismatches; for a file that would execute something or
            cannot be read.
    """
    if not path or "://" in path:
        return
    content = read_weights(path)
    if not path.endswith((".pth", SAFETENSORS)):
        return
    tensors = content.get("model", content)
    theirs = _shapes({name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)})
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
