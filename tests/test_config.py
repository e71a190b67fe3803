"""Config files and overrides: what is wrong is named, with the remedy."""

import pytest

import sasa_det

# isort: split
from conftest import CONFIGS
from detectron2.config import get_cfg

from sasa_det.config import load_config

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
        (["MODEL.SASA.ATTENTION_STAGES", "res3"], "tuple.* vs. res3.*MODEL.SASA.ATTENTION_STAGES"),
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
        (["MODEL.SASA.KERNEL_SIZE", "seven"], "int.* vs. seven.*MODEL.SASA.KERNEL_SIZE"),
        (["MODEL.SASA.NUM_HEADS", "3"], "NUM_HEADS is 3, which does not divide the 64 channels"),
        (["MODEL.SASA.NUM_HEADS", "64"], "NUM_HEADS is 64.*heads of an even size"),
        (["SOLVER.OPTIMIZER", "LION"], "SOLVER.OPTIMIZER must be one of SGD, ADAMW"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_wrong_value_is_named_with_what_is_allowed(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config(FULL, overrides)


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
