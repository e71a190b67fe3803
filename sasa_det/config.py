"""Every config key that sasa_det adds to detectron2's, its default and its meaning."""

import difflib
import logging
import math
import re
import traceback
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from sasa_det.layers.local_attention import POSITIONS

STAGES = ("res2", "res3", "res4", "res5")
STEMS = ("conv", "attention")
_CHOICES = {
    "MODEL.SASA.STEM": STEMS,
    "MODEL.SASA.POSITION": POSITIONS,
    "SOLVER.OPTIMIZER": ("SGD", "ADAMW"),
    "SOLVER.AMP.PRECISION": ("float16", "bfloat16"),
}
_LEAST = {
    "MODEL.SASA.NUM_HEADS": 1,
    "SOLVER.ACCUMULATION_STEPS": 1,
    "SOLVER.MAX_SKIPPED_BATCHES": 0,
}


def add_sasa_config(cfg: CfgNode) -> None:
    """Adds ``MODEL.SASA`` and a few keys for training to a config of detectron2, in place.

    The defaults describe the paper's full attention model. Keys of INPUT and SOLVER that are there
    already, because another project has them, keep their values.
    """
    cfg.MODEL.SASA = CfgNode()
    # "attention": the attention stem of the paper. "conv": detectron2's 7x7 convolution.
    cfg.MODEL.SASA.STEM = "attention"
    # Whether the attention stem mixes four value projections by the position inside a block, as the
    # paper's does, or has one.
    cfg.MODEL.SASA.STEM_MIXED_VALUES = True
    # The stages whose 3x3 convolutions become attention; empty for the convolutional baseline.
    cfg.MODEL.SASA.ATTENTION_STAGES = STAGES
    # Side of the attention window, odd.
    cfg.MODEL.SASA.KERNEL_SIZE = 7
    # Heads of every attention layer; each must get an even number of channels.
    cfg.MODEL.SASA.NUM_HEADS = 8
    # "relative": row and column embeddings. "absolute": sinusoids added to the input of each
    # attention, for the convolutional stem only. "none": attention by content only.
    cfg.MODEL.SASA.POSITION = "relative"
    # A residual connection around the attention of each bottleneck. The paper has none; without it
    # a short training from scratch reaches less.
    cfg.MODEL.SASA.BOTTLENECK_RESIDUAL = True
    # Attention in the towers and predictors of SASARetinaNet's head. It always has a norm:
    # MODEL.RETINANET.NORM, or GN where that is empty.
    cfg.MODEL.SASA.HEAD_ATTENTION = True
    # Attention for the 3x3 convolutions of the FPN's outputs. It always has a norm:
    # MODEL.FPN.NORM, or GN where that is empty.
    cfg.MODEL.SASA.FPN_ATTENTION = False
    # Keep of each residual block only its input, and compute the rest again in the backward pass:
    # less memory, more time, the same gradients.
    cfg.MODEL.SASA.ACTIVATION_CHECKPOINTING = False

    # Train on squares of this side, in pixels, cut from or padded around the randomly scaled
    # image; 0 keeps the resizing of INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.setdefault("IMAGE_SIZE", 0)
    # The range of that random scale, relative to the image fitted into the square.
    cfg.INPUT.setdefault("MIN_SCALE", 0.1)
    cfg.INPUT.setdefault("MAX_SCALE", 2.0)
    # "SGD" or "ADAMW"; the other SOLVER keys mean the same for both.
    cfg.SOLVER.setdefault("OPTIMIZER", "SGD")
    # Parts, one after the other, in which each process computes its share of IMS_PER_BATCH: less
    # memory for the same step. Learning rate, schedule and iterations stay what they are.
    cfg.SOLVER.setdefault("ACCUMULATION_STEPS", 1)
    # How many batches of a training may be skipped because their loss or its gradient is not
    # finite; one more stops it. Nothing is learned from them, but the schedule goes on.
    cfg.SOLVER.setdefault("MAX_SKIPPED_BATCHES", 0)
    # Of SOLVER.AMP.ENABLED: "float16", detectron2's, or "bfloat16", on the CPU too.
    cfg.SOLVER.AMP.setdefault("PRECISION", "float16")


def load_config(config_file: str, overrides: Sequence[str] = ()) -> CfgNode:
    """The frozen config of a YAML file, changed by ["KEY", "VALUE", ...] pairs, checked.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key or an impossible value, with what is allowed instead.
    """
    if not Path(config_file).is_file():
        raise FileNotFoundError(
            f"The config file {config_file!r} does not exist; the ones of this package are in "
            "configs/, for instance configs/retinanet_full_attn.yaml."
        )
    cfg = get_cfg()
    add_sasa_config(cfg)
    _merge_file(cfg, config_file)
    if len(overrides) % 2:
        raise ValueError(
            "Overrides are KEY VALUE pairs, but their number is odd: " + " ".join(overrides)
        )
    for key, value in zip(overrides[::2], overrides[1::2]):
        try:
            cfg.merge_from_list([key, value])
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(_unknown_key(cfg, key, " on the command line")) from error
        except ValueError as error:
            raise ValueError(_wrong_type(cfg, error, "")) from error
    check_sasa_config(cfg)
    check_training_config(cfg)
    cfg.freeze()
    return cfg


def _merge_file(cfg: CfgNode, config_file: str) -> None:
    try:
        # Never execute what a YAML file says: detectron2 would by default.
        cfg.merge_from_file(config_file, allow_unsafe=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The _BASE_ of the config file {config_file!r} does not exist: {error.filename}"
        ) from error
    except KeyError as error:
        raise ValueError(_unknown_key(cfg, str(error.args[0]), f" in {config_file}")) from error
    except ValueError as error:
        raise ValueError(_wrong_type(cfg, error, f" in {config_file}")) from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"The config file {config_file!r} is no plain YAML, and Python in it is not executed; "
            f"write out what it computes: {reason}"
        ) from error
    except AssertionError as error:
        raise ValueError(f"The config file {config_file!r} is no config: {error}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"The config file {config_file!r} is no config: keys with values are missing."
        ) from error
    except RecursionError as error:
        raise ValueError(f"The _BASE_ of {config_file!r} leads back to itself.") from error


def check_sasa_config(cfg: CfgNode) -> None:
    """Raises ValueError, naming key, value and what is allowed, for an impossible MODEL.SASA."""
    if "SASA" not in cfg.MODEL:
        raise ValueError(
            "The config has no MODEL.SASA; call sasa_det.add_sasa_config(cfg) "
            "right after detectron2's get_cfg()."
        )
    _check_values(cfg, ("MODEL.SASA",))
    sasa = cfg.MODEL.SASA
    for stage in sasa.ATTENTION_STAGES:
        check_choice("MODEL.SASA.ATTENTION_STAGES", stage, STAGES)
    if sasa.KERNEL_SIZE < 1 or sasa.KERNEL_SIZE % 2 == 0:
        raise ValueError(
            f"MODEL.SASA.KERNEL_SIZE must be odd, but is {sasa.KERNEL_SIZE}; the paper uses 7."
        )
    if sasa.POSITION == "absolute" and sasa.STEM == "attention":
        raise ValueError(
            "MODEL.SASA.POSITION is absolute, for which the three channels of an image leave the "
            "attention stem no room; set MODEL.SASA.STEM to conv."
        )
    _check_channels(cfg)


def check_training_config(cfg: CfgNode) -> None:
    """The same for the keys of INPUT and SOLVER, which only this package's trainer reads."""
    _check_values(cfg, ("INPUT", "SOLVER"))
    resizing = cfg.INPUT
    if resizing.IMAGE_SIZE < 0:
        raise ValueError(
            f"INPUT.IMAGE_SIZE must be pixels, or 0 for none, but is {resizing.IMAGE_SIZE}."
        )
    if resizing.MIN_SCALE <= 0:
        raise ValueError(f"INPUT.MIN_SCALE must be above 0, but is {resizing.MIN_SCALE}.")
    if resizing.MAX_SCALE < resizing.MIN_SCALE:
        raise ValueError(
            f"INPUT.MAX_SCALE must be INPUT.MIN_SCALE, {resizing.MIN_SCALE}, or more, but is "
            f"{resizing.MAX_SCALE}."
        )
    if resizing.IMAGE_SIZE and resizing.CROP.ENABLED:
        raise ValueError(
            "INPUT.CROP.ENABLED has no effect beside INPUT.IMAGE_SIZE, which cuts squares out "
            "itself; set one of them to False or 0."
        )


def _check_values(cfg: CfgNode, sections: tuple[str, ...]) -> None:
    for key, default in own_defaults().items():
        if not key.startswith(sections):
            continue
        value = _value(cfg, key)
        if not _is_like(default, value) or (key in _CHOICES and value not in _CHOICES[key]):
            raise ValueError(f"{key} must be {_allowed(key, default)}, but is {value!r}.")
        if key in _LEAST and value < _LEAST[key]:
            raise ValueError(f"{key} must be {_LEAST[key]} or more, but is {value}.")


def check_processes(cfg: CfgNode, num_processes: int) -> None:
    """Raises ValueError where the batch cannot be shared out, or the device lacks the precision."""
    solver = cfg.SOLVER
    batch = solver.IMS_PER_BATCH
    if solver.REFERENCE_WORLD_SIZE:  # detectron2 will scale it
        batch = batch * num_processes // solver.REFERENCE_WORLD_SIZE
    shares = num_processes * solver.ACCUMULATION_STEPS
    if batch % shares:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch}, which cannot be shared out to "
            f"{num_processes} processes in {solver.ACCUMULATION_STEPS} parts each "
            f"(SOLVER.ACCUMULATION_STEPS); choose a multiple of {shares}."
        )
    if solver.AMP.ENABLED and solver.AMP.PRECISION == "float16" and cfg.MODEL.DEVICE == "cpu":
        raise ValueError(
            "SOLVER.AMP.PRECISION float16 needs a GPU; set it to bfloat16, or SOLVER.AMP.ENABLED "
            "to False."
        )


def _check_channels(cfg: CfgNode) -> None:
    """Every attention layer's channels must divide into heads of an even size."""
    sasa, resnets = cfg.MODEL.SASA, cfg.MODEL.RESNETS
    bottleneck = resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP
    is_ours = "sasa" in cfg.MODEL.BACKBONE.NAME
    channels = {
        f"{stage} (MODEL.RESNETS.WIDTH_PER_GROUP)": bottleneck * 2**i
        for i, stage in enumerate(STAGES)
        if is_ours and stage in sasa.ATTENTION_STAGES
    }
    if is_ours and sasa.STEM == "attention":
        channels["the stem (MODEL.RESNETS.STEM_OUT_CHANNELS)"] = resnets.STEM_OUT_CHANNELS
    attention_head = sasa.HEAD_ATTENTION and cfg.MODEL.META_ARCHITECTURE == "SASARetinaNet"
    if (is_ours and sasa.FPN_ATTENTION) or attention_head:
        channels["the FPN (MODEL.FPN.OUT_CHANNELS)"] = cfg.MODEL.FPN.OUT_CHANNELS
    for part, number in channels.items():
        if number % (2 * sasa.NUM_HEADS):
            raise ValueError(
                f"MODEL.SASA.NUM_HEADS is {sasa.NUM_HEADS}, which does not divide the {number} "
                f"channels of {part} into heads of an even size; choose a NUM_HEADS that does."
            )
        if sasa.POSITION == "absolute" and number % 4:
            raise ValueError(
                f"MODEL.SASA.POSITION absolute needs channels divisible by 4, but {part} has "
                f"{number}."
            )


def check_choice(key: str, value: object, allowed: Sequence[str]) -> None:
    """Raises ValueError, naming the key, the value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, but is {value!r}.")


def check_trainable(cfg: CfgNode) -> None:
    """Raises ValueError for a backbone that would keep random weights for ever."""
    backbone = cfg.MODEL.BACKBONE
    if cfg.MODEL.WEIGHTS or "resnet" not in backbone.NAME:
        return
    remedy = "give MODEL.WEIGHTS a trained backbone, or train it from scratch with"
    if backbone.FREEZE_AT > 0:
        raise ValueError(
            f"MODEL.BACKBONE.FREEZE_AT is {backbone.FREEZE_AT}, but without MODEL.WEIGHTS what it "
            f"freezes is random; {remedy} MODEL.BACKBONE.FREEZE_AT 0."
        )
    if cfg.MODEL.RESNETS.NORM == "FrozenBN":
        raise ValueError(
            "MODEL.RESNETS.NORM is 'FrozenBN', which without MODEL.WEIGHTS normalises nothing; "
            f"{remedy} MODEL.RESNETS.NORM BN, SyncBN or GN."
        )


def check_model(cfg: CfgNode) -> None:
    """Raises ValueError if no model can be built; takes no memory for weights, no random numbers.

    What is wrong with the keys that detectron2 owns is known by building only.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    logging.disable(logging.WARNING)  # the model that is trained will say it again
    try:
        with torch.device("meta"):
            build_model(cfg)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise ValueError(f"The model cannot be built: {_cause(cfg, error)}") from error
    finally:
        logging.disable(logging.NOTSET)


def _cause(cfg: CfgNode, error: Exception) -> str:
    """What an error in building says, with the key of a name that is not there."""
    message = " ".join(str(error).split())
    name = re.search(r"'(\w+)'", message)
    if isinstance(error, KeyError) and name:
        keys = [key for key in _flat_keys(cfg.MODEL, "MODEL.") if not key.startswith("MODEL.SASA")]
        names = {key: _value(cfg, key) for key in keys}
        lists = (list, tuple)
        asking = [k for k, x in names.items() if name[1] in (x if isinstance(x, lists) else [x])]
        if asking:
            return f"there is no {name[1]!r}, for which {' or '.join(asking)} asks."
    # Many of detectron2's assertions have no message but themselves.
    return message or str(traceback.extract_tb(error.__traceback__)[-1].line)


@cache
def own_defaults() -> dict[str, Any]:
    """{key: default} of what ``add_sasa_config`` adds to detectron2's config."""
    theirs, ours = get_cfg(), get_cfg()
    add_sasa_config(ours)
    known = _flat_keys(theirs)
    own = [key for key in _flat_keys(ours) if key not in known]
    return {key: _value(ours, key) for key in own if not isinstance(_value(ours, key), CfgNode)}


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _is_like(default: Any, value: Any) -> bool:
    """Whether a value, however it came into the config, is of the default's kind."""
    if isinstance(default, float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(default, (list, tuple)):
        return isinstance(value, (list, tuple))
    return type(value) is type(default)


def _allowed(key: str, default: Any) -> str:
    if key in _CHOICES:
        return f"one of {', '.join(_CHOICES[key])}"
    if isinstance(default, (list, tuple)):
        return "a list or tuple"
    kinds = {
        **{bool: "True or False", str: "a text", CfgNode: "a section with keys"},
        **{int: "a whole number", float: "a finite number with a decimal point"},
    }
    return kinds.get(type(default), "a value")


def _wrong_type(cfg: CfgNode, error: ValueError, where: str) -> str:
    """yacs's message about a type, as one sentence; other messages as they are."""
    message = str(error)
    key = message.rsplit(" ", 1)[-1]
    if not message.startswith("Type mismatch") or key not in _flat_keys(cfg):
        return message
    default = _value(cfg, key)
    value = message.split(f"({default} vs. ", 1)[-1].rsplit(") for config key: ", 1)[0]
    wrong = re.search(r"vs\. <class '(?:[\w.]*\.)?(\w+)'>", message)
    kind = f", of type {wrong[1]}" if wrong else ""
    return f"{key} must be {_allowed(key, default)}, but is {value}{kind}{where}."


def _unknown_key(cfg: CfgNode, message: str, where: str) -> str:
    """``message`` is yacs's, or the key itself."""
    key = message.rsplit(" ", 1)[-1]
    known = _flat_keys(cfg)
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"There is no config key {key!r}{where}{hint}"


def _flat_keys(cfg: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for key, value in cfg.items():
        keys.append(prefix + key)
        if isinstance(value, CfgNode):
            keys += _flat_keys(value, f"{prefix}{key}.")
    return keys
