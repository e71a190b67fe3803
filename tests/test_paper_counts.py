"""Parameters and FLOPs of the real models are the paper's."""

import json

import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS
from detectron2.modeling import build_model
from fvcore.nn import FlopCountAnalysis
from torch import nn

from sasa_det.analysis import count_detector, count_network, flop_handles
from sasa_det.analysis.paper import TABLE_1, TABLE_2, TABLE_2_IMAGE_SIZE, TABLE_2_NUM_CLASSES
from sasa_det.config import load_config
from sasa_det.layers import LocalSelfAttention2d, StemSelfAttention2d
from sasa_det.modeling import make_sasa_resnet

# The fifth row's published FLOPs lie between the two ways to count it.
FLOPS_TOLERANCE = {row.config: 0.015 for row in TABLE_2} | {"retinanet_full_attn": 0.04}
# By hand, GFLOPs (paper's counting, executed), as each row's layers add up.
BY_HAND = {
    "retinanet_conv": (182.3, 182.3),
    "retinanet_convstem_attn_backbone": (172.4, 171.1),
    "retinanet_full_attn_backbone": (174.2, 172.2),
    "retinanet_convstem_attn": (112.2, 109.1),
    "retinanet_full_attn": (114.0, 110.1),
}


def count(config):
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", str(TABLE_2_NUM_CLASSES)]
    cfg = load_config(str(CONFIGS / f"{config}.yaml"), overrides)
    return count_detector(build_model(cfg), TABLE_2_IMAGE_SIZE)


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: row.config)
def test_table_2(row):
    cost = count(row.config)
    assert cost.total.params / 1e6 == pytest.approx(row.params_m, rel=0.005)
    tolerance = FLOPS_TOLERANCE[row.config]
    assert cost.total.flops_paper / 1e9 == pytest.approx(row.gflops, rel=tolerance)
    paper, executed = BY_HAND[row.config]
    assert cost.total.flops_paper / 1e9 == pytest.approx(paper, abs=0.06)
    assert cost.total.flops_executed / 1e9 == pytest.approx(executed, abs=0.06)
    for figure in ("params", "flops_executed", "flops_paper"):
        parts = sum(getattr(part, figure) for part in cost.parts.values())
        assert parts == getattr(cost.total, figure)


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: f"{row.model}-{row.depth}")
def test_table_1(row):
    resnet = make_sasa_resnet(
        depth=row.depth, stem=row.stem, attention_stages=row.attention_stages, num_classes=1000
    )
    cost = count_network(resnet, 224)
    assert cost.params / 1e6 == pytest.approx(row.params_m, rel=0.015)
    assert cost.flops_paper / 1e9 == pytest.approx(row.gflops, rel=0.015)


def test_attention_in_the_fpn_costs_what_the_readme_says():
    cost = count("retinanet_full_attn_fpn").total
    assert cost.params / 1e6 == pytest.approx(20.8, abs=0.05)
    assert cost.flops_paper / 1e9 == pytest.approx(108.0, abs=0.06)
    assert cost.flops_executed / 1e9 == pytest.approx(104.0, abs=0.06)


@pytest.mark.parametrize(("mixtures", "paper"), [(4, 6 * 3 + 48 + 4), (1, 3 * 3 + 48)])
def test_the_stem_by_hand(mixtures, paper):
    stem = StemSelfAttention2d(3, 16, num_heads=2, num_mixtures=mixtures)
    cost = count_network(nn.Sequential(stem), 20)
    mixture = 16 * 16 * 4 if mixtures == 4 else 0  # p(a, b, m) for the 16 positions of a block
    assert cost.flops_paper == 2 * (400 * 16 * paper + mixture)
    # The weights of the positions are mixed once, not the values of each pixel.
    assert cost.flops_executed == 2 * (400 * 16 * (3 * 3 + 48) + 4 * mixture)


def test_absolute_positions_cost_no_flops():
    layers = [
        LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=4, position=position)
        for position in ("absolute", "none")
    ]
    absolute, by_content = (count_network(nn.Sequential(x), 20, in_channels=16) for x in layers)
    assert absolute == by_content


def test_one_layer_by_hand():
    cost = count_network(nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), attention()), 20)
    projections = 400 * (3 * 16 + 3 * 16 * 16)
    window = 400 * 16 * (25 + 25)
    assert cost.flops_executed == 2 * (projections + window + 400 * 16 * 5)
    assert cost.flops_paper == 2 * (projections + window + 400 * 16 * 25)


def attention():
    return LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=4)


def test_the_handles_serve_fvcore_directly_and_its_unit_is_the_multiply_add():
    layer, image = attention(), torch.zeros(1, 16, 20, 20)
    without_handles = FlopCountAnalysis(layer, image).total()
    analysis = FlopCountAnalysis(layer, image).set_op_handle(**flop_handles(dense=False))
    assert without_handles < analysis.total()
    assert 2 * analysis.total() == count_network(nn.Sequential(layer), 20, in_channels=16)[1]


def test_an_operator_that_nobody_counts_is_an_error():
    class Cumulative(nn.Conv2d):
        def forward(self, x):
            return super().forward(x).cumsum(dim=2)

    with pytest.raises(RuntimeError, match="uncounted: aten::cumsum"):
        count_network(Cumulative(3, 4, 1), 8)


def test_the_tool_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "cost.json"
    config = "configs/retinanet_full_attn.yaml"
    run = run_tool("tools/analyze_model.py", "--config", config, "--json", path)
    assert run.returncode == 0, run.stderr
    assert "paper, Table 2" in run.stdout
    cost = json.loads(path.read_text())
    assert cost["params"] == 21986356
    assert cost["paper"] == {"gflops": 110, "params_m": 22.0}
    assert set(cost["parts"]) == {"stem", "res2", "res3", "res4", "res5", "fpn", "head"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config", "configs/none.yaml"], "The config file 'configs/none.yaml'"),
        (["--config", "configs/demo.yaml", "--json", "tools"], "The output 'tools' is a folder"),
    ],
)
def test_the_tool_answers_a_mistake_in_one_sentence(arguments, sentence):
    run = run_tool("tools/analyze_model.py", *arguments)
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1].startswith(f"error: {sentence}")
    assert "Traceback" not in run.stderr
