"""Config files and overrides: what is wrong is named, with the remedy."""

import functools
import random
import re

import numpy as np
import pytest
import torch

import sasa_det

# isort: split
from conftest import CONFIGS
from detectron2.config import get_cfg

from sasa_det.config import (
    check_model,
    check_sasa_config,
    check_trainable,
    check_training_config,
    load_config,
    own_defaults,
)
from sasa_det.engine import Trainer

FULL = str(CONFIGS / "retinanet_full_attn.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_file_loads(path):
    cfg = load_config(str(path))
    assert cfg.is_frozen()
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1 is False


def test_the_defaults_are_the_papers_full_attention_model():
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    full = load_config(FULL)
    assert cfg.MODEL.SASA == full.MODEL.SASA


def test_overrides_of_the_command_line_win():
    cfg = load_config(FULL, ["MODEL.SASA.ATTENTION_STAGES", "()", "SOLVER.MAX_ITER", "4"])
    assert cfg.MODEL.SASA.ATTENTION_STAGES == ()
    assert cfg.SOLVER.MAX_ITER == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.SASA.STEMS", "conv"], "MODEL.SASA.STEMS.*did you mean MODEL.SASA.STEM?"),
        (["MODEL.SASA.STEM"], "KEY VALUE pairs"),
        (["MODEL.SASA.STEM", "pool"], "MODEL.SASA.STEM must be one of conv, attention, but is"),
        (["MODEL.SASA.ATTENTION_STAGES", "('res1',)"], "one of res2, res3, .* but is 'res1'"),
        (["MODEL.SASA.ATTENTION_STAGES", "res3"], "SASA.ATTENTION_STAGES must be a list.*is res3"),
        (["MODEL.SASA.POSITION", "learned"], "must be one of relative, absolute, none"),
        (["MODEL.SASA.POSITION", "absolute"], "no room; set MODEL.SASA.STEM to conv"),
        (
            [
                *("MODEL.SASA.POSITION", "absolute", "MODEL.SASA.STEM", "conv"),
                *("MODEL.SASA.NUM_HEADS", "1", "MODEL.FPN.OUT_CHANNELS", "66"),
            ],
            "divisible by 4, but the FPN .* has 66",
        ),
        (["MODEL.SASA.KERNEL_SIZE", "8"], "KERNEL_SIZE must be odd, but is 8"),
        (["MODEL.SASA.KERNEL_SIZE", "seven"], "KERNEL_SIZE must be a whole.*is seven, of type str"),
        (["MODEL.SASA.KERNEL_SIZE", "None"], "KERNEL_SIZE must be a whole number, but is None"),
        (["MODEL.SASA.STEM", "3"], "STEM must be one of conv, attention, but is 3, of type int"),
        (["MODEL.SASA.STEM.a", "3"], "no config key 'MODEL.SASA.STEM.a'"),
        (["MODEL.SASA", "3"], "MODEL.SASA must be a section with keys, but is 3"),
        (
            ["INPUT.IMAGE_SIZE", "128", "INPUT.CROP.ENABLED", "True"],
            "CROP.ENABLED has no effect beside INPUT.IMAGE_SIZE",
        ),
        (["INPUT.MAX_SCALE", "0.4"], "MAX_SCALE must be INPUT.MIN_SCALE, 0.5, or more, but is 0.4"),
        (["MODEL.SASA.NUM_HEADS", "3"], "NUM_HEADS is 3, which does not divide the 64 channels"),
        (["MODEL.SASA.NUM_HEADS", "64"], "NUM_HEADS is 64.*heads of an even size"),
        (["SOLVER.OPTIMIZER", "LION"], "SOLVER.OPTIMIZER must be one of SGD, ADAMW"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_value_is_named_with_what_is_allowed(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(FULL, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.RESNETS.DEPTH", "34"], r"DEPTH\) must be one of 26, .*, but is 34"),
        (["MODEL.RESNETS.RES5_DILATION", "2"], "leave MODEL.RESNETS.RES5_DILATION at 1"),
        (["MODEL.RESNETS.NUM_GROUPS", "32"], "NUM_GROUPS is 32, .*set NUM_GROUPS to 1"),
        (["MODEL.RETINANET.NORM", "BN"], "MODEL.RETINANET.NORM cannot be 'BN' in an attention"),
        (
            ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"],
            "a multiple of 32 channels, but MODEL.RESNETS.STEM_OUT_CHANNELS is 16",
        ),
        (
            ["MODEL.FPN.OUT_CHANNELS", "48", "MODEL.SASA.NUM_HEADS", "4"],
            "a multiple of 32 channels, but MODEL.FPN.OUT_CHANNELS is 48",
        ),
        (["MODEL.RESNETS.NORM", "XX"], "there is no 'XX', for which MODEL.RESNETS.NORM asks"),
        (["MODEL.FPN.IN_FEATURES", "['res2']"], "no 'res2', for which MODEL.FPN.IN_FEATURES asks"),
        (["MODEL.RETINANET.IN_FEATURES", "['p3', 'p7']"], "the number of input features is 2"),
        (["MODEL.RESNETS.OUT_FEATURES", "['res9']"], "one of stem, res2, .* but is 'res9'"),
        (["MODEL.BACKBONE.NAME", "build_foo"], "'build_foo', for which MODEL.BACKBONE.NAME asks"),
        (["MODEL.FPN.FUSE_TYPE", "max"], "assert fuse_type in"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_model_that_cannot_be_built_is_told_by_its_config(overrides, message):
    with pytest.raises(ValueError, match=f"The model cannot be built: .*{message}"):
        check_model(load_config(FULL, overrides))


def test_to_ask_whether_a_model_can_be_built_draws_no_random_numbers():
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_model(load_config(FULL))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_heads_are_asked_of_models_with_attention_only():
    plain = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RESNETS.WIDTH_PER_GROUP", "12"]
    load_config(FULL, [*plain, "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"])
    with pytest.raises(ValueError, match="NUM_HEADS is 8, which does not divide the 12 channels"):
        load_config(FULL, plain)


def test_an_unknown_key_in_a_file_is_named(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text(f"_BASE_: {FULL}\nMODEL:\n  SASA:\n    KERNELSIZE: 5\n")
    with pytest.raises(ValueError, match=r"MODEL.SASA.KERNELSIZE.*typo.yaml.*SASA.KERNEL_SIZE"):
        load_config(str(path))


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"'nowhere.yaml' does not exist.*configs/"):
        load_config("nowhere.yaml")


def test_a_config_file_executes_nothing(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match=r"evil\.yaml"):
        load_config(str(path))
    assert not (tmp_path / "made").exists()
    second = tmp_path / "second.yaml"
    second.write_text("_BASE_: evil.yaml\n")
    with pytest.raises(ValueError, match=r"second\.yaml' is no plain YAML"):
        load_config(str(second))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is no config: keys with values are missing"),
        ("- MODEL", "is no config: keys with values are missing"),
        ("MODEL: [", "is no plain YAML"),
        ("VERSION: 2\nMODEL: 5", "MODEL must be a section with keys, but is 5, of type int in "),
        ("MODEL: {SASA: {STEM: {a: 1}}}", "STEM must be one of conv, attention, but is a: 1"),
        ("MODEL: {SASA: {KERNEL_SIZE: 2001-01-01}}", "MODEL.SASA.KERNEL_SIZE .* no.* valid type"),
        ("VERSION: 9", "Cannot merge a v9 config"),
        ("_BASE_: nowhere.yaml", "The _BASE_ of the .* does not exist: .*nowhere.yaml"),
        ("_BASE_: wrong.yaml", "The _BASE_ of '.*wrong.yaml' leads back to itself"),
    ],
)
def test_what_is_no_config_file_is_named(text, sentence, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=sentence) as error:
        load_config(str(path))
    assert "wrong.yaml" in str(error.value)
    assert "\n" not in str(error.value)


# For each kind of key, what it can never be: of another type, or impossible.
NOT_IT = {
    bool: [None, 2, "maybe", 0.0],
    int: [None, "many", 1.5, True, -1],
    float: [None, "much", True, -1.0, float("nan"), float("inf")],
    str: [None, 7, True, "no such choice", ""],
    tuple: [None, 7, "res2", ("no such thing",), (3,)],
}


@pytest.mark.parametrize("key", own_defaults())
def test_each_key_of_ours_refuses_what_it_cannot_be(key):
    """Keys that are added later too: whoever adds one says in config.py what it may be."""
    default = own_defaults()[key]
    check = check_sasa_config if key.startswith("MODEL") else check_training_config
    for value in NOT_IT[type(default)]:
        cfg = get_cfg()
        sasa_det.add_sasa_config(cfg)
        *sections, name = key.split(".")
        functools.reduce(getattr, sections, cfg)[name] = value
        with pytest.raises(ValueError, match=re.escape(key)) as error:
            check(cfg)
        shown = value[0] if isinstance(value, tuple) else value
        assert repr(shown) in str(error.value)
        assert " must " in str(error.value)


def test_keys_that_another_project_has_are_its_own():
    cfg = get_cfg()
    theirs = {"INPUT.IMAGE_SIZE": (640, 480), "INPUT.MIN_SCALE": 3.0, "SOLVER.OPTIMIZER": "LAMB"}
    for key, value in theirs.items():
        section, name = key.split(".")
        cfg[section][name] = value
    sasa_det.add_sasa_config(cfg)
    assert {key: cfg[key.split(".")[0]][key.split(".")[1]] for key in theirs} == theirs
    cfg.MODEL.BACKBONE.NAME = "build_sasa_resnet_backbone"
    check_model(cfg)


def test_the_trainer_checks_the_keys_that_only_it_reads():
    cfg = get_cfg()
    sasa_det.add_sasa_config(cfg)
    cfg.SOLVER.OPTIMIZER = "LAMB"
    with pytest.raises(ValueError, match=r"SOLVER.OPTIMIZER must be one of SGD, ADAMW"):
        Trainer(cfg)


def test_frozen_random_weights_are_no_start():
    frozen = load_config(FULL, ["MODEL.RESNETS.NORM", "FrozenBN"])
    with pytest.raises(ValueError, match=r"NORM is 'FrozenBN', which without MODEL.WEIGHTS"):
        check_trainable(frozen)
    with pytest.raises(ValueError, match=r"FREEZE_AT is 2, but without MODEL.WEIGHTS"):
        check_trainable(load_config(FULL, ["MODEL.BACKBONE.FREEZE_AT", "2"]))
    check_trainable(load_config(FULL))
    frozen.defrost()
    frozen.MODEL.WEIGHTS = "trained.pth"
    check_trainable(frozen)
