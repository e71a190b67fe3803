"""Checkpoints that are whole or not there, and what can be known of one before a model starts."""

import contextlib
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from detectron2.utils import comm

from sasa_det.config import STAGES
from sasa_det.weight_files import (
    SAFETENSORS,
    RefusedWeightsError,
    SafeCheckpointer,
    model_of,
    read_weights,
)
from sasa_det.whole_files import CheckpointError, save_whole, write_text

SHOWN_MISMATCHES = 3
# Buffers in checkpoints of other versions and norms; a model has its own.
_OF_OTHER_VERSIONS = re.compile(
    r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+|num_batches_tracked)$"
)


class WholeCheckpointer(SafeCheckpointer):
    """detectron2's checkpointer, safe, that a kill, a full disk or a bad file costs no run.

    A file appears under its name once all of it is on the disk. ``last_checkpoint`` names it after
    that. Where the file that it names is damaged, the one written before it is resumed from.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Raises CheckpointError, which names the last whole one, if it cannot be written."""
        if not self.save_dir or not self.save_to_disk:
            return
        content = {"model": self.model.state_dict()}
        content |= {key: x.state_dict() for key, x in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        for left_by_a_kill in path.parent.glob(".*.pth.part"):
            left_by_a_kill.unlink()
        self.logger.info("Saving checkpoint to %s", path)
        try:
            save_whole({**content, **kwargs}, path)
            self.tag_last_checkpoint(path.name)
        except OSError as error:
            last = self.get_checkpoint_file()
            remedy = f"; {last} is whole: make room, and go on with --resume." if last else "."
            raise CheckpointError(f"{error}{remedy}") from error

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(last_filename_basename, Path(self.save_dir) / "last_checkpoint")

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """As detectron2's; all processes must call it.

        Raises:
            CheckpointError: to resume from, there are damaged checkpoints only.
        """
        if resume and self.has_checkpoint():
            return self.load(self.last_whole_checkpoint())
        return self.load(path, checkpointables=[])

    def last_whole_checkpoint(self) -> str:
        """The path that ``last_checkpoint`` names or, after a warning, the newest that is whole."""
        found = self._find_whole() if comm.is_main_process() else ("", "")
        path, damage = comm.all_gather(found)[0]
        if not path:
            raise CheckpointError(
                f"{damage}, and no other checkpoint in {self.save_dir!r} is whole; start without "
                "--resume."
            )
        if damage:
            logging.getLogger("detectron2").warning("%s; going on from %s.", damage, path)
        return path

    def _find_whole(self) -> tuple[str, str]:
        """Its path, and what is wrong with those that should have come before it."""
        folder = Path(self.save_dir)
        name = (folder / "last_checkpoint").read_text(errors="replace").strip()
        others = [Path(file) for file in self.get_all_checkpoint_files()]
        # By the time of writing: an earlier training may have left later steps in the folder.
        others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        wrong = []
        for path in dict.fromkeys([folder / name, *others]):
            if not path.is_file():
                tag = str(folder / "last_checkpoint")
                wrong.append(f"{tag!r} names {name!r}, which is no file there")
            elif damage := what_is_damaged(path):
                wrong.append(f"The checkpoint {str(path)!r} is damaged: {damage}")
            elif path.name == name or self._is_of_training(path):
                return str(path), "; ".join(wrong)
        return "", "; ".join(wrong)

    def _is_of_training(self, path: Path) -> bool:
        """Not only weights that somebody put there."""
        content = read_weights(str(path))
        return all(key in content for key in self.checkpointables)


class StrictCheckpointer(WholeCheckpointer):
    """Refuses what detectron2 warns of: a model that predicts needs each of its weights, and of a
    checkpoint that has more than those another model was trained."""

    def _load_model(self, checkpoint: Any) -> Any:
        incompatible = super()._load_model(checkpoint)
        names = [n for n in incompatible.missing_keys if not n.endswith("num_batches_tracked")]
        if names:
            shapes = {name: shapes for name, *shapes in incompatible.incorrect_shapes}
            name = next((name for name in names if name in shapes), names[0])
            first = f"{name} is not in it"
            if name in shapes:
                first = shape_mismatch(name, *shapes[name])
            raise RefusedWeightsError(
                f"The checkpoint does not fit the config: {len(names)} of the model's tensors are "
                f"missing or of another shape, for instance {first}; give the config it was "
                "trained with."
            )
        names = [n for n in incompatible.unexpected_keys if not _OF_OTHER_VERSIONS.search(n)]
        # Where names are matched by their ends, detectron's own files have some of no model.
        if names and not checkpoint.get("matching_heuristics"):
            raise RefusedWeightsError(
                f"The checkpoint does not fit the config: {len(names)} of its tensors have no "
                f"place in the model, for instance {names[0]}; give the config it was trained with."
            )
        return incompatible


def what_is_damaged(path: Path) -> str | None:
    """None for a file of torch.save that has every byte as it was written."""
    try:
        with zipfile.ZipFile(path) as file:
            part = file.testzip()  # torch does not look at the checksums that it writes
    except Exception as error:  # of nearly any kind, if bytes are any
        return str(error)
    return part and f"{part} has other bytes than were written"


def check_weights(path: str, cfg: CfgNode) -> None:
    """Checks that the ResNet of a checkpoint has the depth and the width of the config's.

    detectron2 leaves out what does not fit, with a warning for each, and trains half a backbone
    from random weights. Tensors of other names may be missing or left over: another stem or head,
    stages that attend instead. Only local files are looked into, of pickles only whether they are
    to be trusted.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with the first three mismatches; for a file that would execute something or
            cannot be read.
    """
    if not path or "://" in path:
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"The checkpoint {path!r} of MODEL.WEIGHTS does not exist.")
    content = read_weights(path)
    if path.endswith((".pth", SAFETENSORS)):
        _check_backbone(content, path, cfg)


def _check_backbone(content: dict[str, Any], path: str, cfg: CfgNode) -> None:
    theirs = _shapes(model_of(content, path))
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
            f"The checkpoint {path!r} is of another depth, width or window than "
            f"the config's backbone: {'; '.join(mismatches[:SHOWN_MISMATCHES])}; set "
            "MODEL.RESNETS and MODEL.SASA to what it was trained with."
        )


def check_last_checkpoint(cfg: CfgNode, *, training: bool) -> None:
    """The same for what is resumed from, and that a ``training`` has its optimiser.

    Where the file is damaged or lost, an earlier one will be resumed from.

    Raises:
        ValueError: as above.
        CheckpointError: for another optimiser's.
    """
    tag = Path(cfg.OUTPUT_DIR, "last_checkpoint")
    path = tag.parent / tag.read_text(errors="replace").strip()
    if path.is_file():
        with contextlib.suppress(RefusedWeightsError):
            content = read_weights(str(path))
            _check_backbone(content, str(path), cfg)
            if training and "trainer" in content:
                check_optimizer(content["trainer"], cfg)


def check_optimizer(trainer: dict[str, Any], cfg: CfgNode) -> None:
    """Raises CheckpointError for the state of a trainer with another SOLVER.OPTIMIZER, or none."""
    optimizer = trainer.get("_trainer", {}).get("optimizer")
    if optimizer is None:
        raise CheckpointError(
            "The training to resume is not of this trainer: its checkpoint has no optimiser's "
            "state; take it as MODEL.WEIGHTS without --resume."
        )
    (group, *_) = optimizer["param_groups"]
    is_sgd = "momentum" in group  # of the two that there are
    if is_sgd != (cfg.SOLVER.OPTIMIZER == "SGD"):
        raise CheckpointError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER}, but the training to resume is of "
            "another; set it to that, or take the checkpoint as MODEL.WEIGHTS without --resume."
        )


def warn_of_frozen_random_weights(cfg: CfgNode) -> None:
    """Warns, in detectron2's log, of a backbone whose frozen layers no checkpoint fills.

    detectron2's defaults freeze two stages and, in its own configs, all norms: right for the
    weights of ImageNet that come with them. Such a training from random weights ends at an AP of
    about zero, without an error.
    """
    sasa, freeze_at, weights = cfg.MODEL.SASA, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.WEIGHTS
    if freeze_at <= 0 and cfg.MODEL.RESNETS.NORM != "FrozenBN":
        return
    if weights and not _is_convolutional(weights):
        return
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
    if not weights.endswith((".pth", SAFETENSORS)) or not Path(weights).is_file():
        return False
    try:
        tensors = model_of(read_weights(weights), weights)
    except RefusedWeightsError:
        return False
    return not any(".attention." in name for name in tensors)


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
