"""The benchmark measures what it says, and its peers compute what they say."""

import importlib.util
import json
import statistics
import subprocess
import sys
import time

import pytest
import torch

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS, ROOT
from detectron2.modeling import build_model

from sasa_det.analysis import charts, report, workloads
from sasa_det.analysis.comparison import Comparison, Row
from sasa_det.analysis.detector_workloads import build_detector, compile_networks, model_contestants
from sasa_det.analysis.memory import PeakMemory, peak_memory
from sasa_det.analysis.peers import PEERS, available_peers
from sasa_det.analysis.timing import SHORTEST_SAMPLE, SLOW, SLOW_ROUNDS, Steps, race, reason
from sasa_det.analysis.workloads import CONVOLUTION, OURS, LayerShape, Setting
from sasa_det.config import load_config
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import backends

ALLOCATED = 64 * 2**20


def config(name):
    return load_config(str(CONFIGS / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])


def load_tool():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "tools" / "benchmark.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pair_of_layers(name, kernel_size=5):
    """Ours with large embeddings, so that a wrong one shows, and a peer of the same weights."""
    torch.manual_seed(0)
    ours = LocalSelfAttention2d(6, 8, kernel_size, num_heads=2)
    torch.nn.init.normal_(ours.rel_rows)
    torch.nn.init.normal_(ours.rel_cols)
    peer = PEERS[name].make(6, 8, kernel_size, 2)
    peer.load_state_dict(ours.state_dict())
    return ours, peer


@torch.no_grad()
def test_flex_attention_computes_eq_3():
    # More than one block of 128 positions, the last one incomplete.
    ours, peer = pair_of_layers("FlexAttention")
    x = torch.randn(2, 6, 13, 23)
    torch.testing.assert_close(peer(x), ours(x), atol=1e-5, rtol=1e-5)


def test_unfold_computes_eq_3_away_from_the_border_only():
    ours, peer = pair_of_layers("eager unfold")
    x = torch.randn(2, 6, 9, 11)
    expected, output = ours(x), peer(x)
    inside = (..., slice(2, -2), slice(2, -2))
    torch.testing.assert_close(output[inside], expected[inside], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(output[..., 0, :], expected[..., 0, :], atol=1e-3)
    gradients = [
        torch.autograd.grad(y[inside].square().sum(), list(layer.parameters()))
        for y, layer in ((output, peer), (expected, ours))
    ]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


def test_halo_attention_has_the_interface_of_the_layer():
    pytest.importorskip("timm")
    assert PEERS["HaloAttn"].make(8, 16, 7, 2)(torch.randn(2, 8, 10, 24)).shape == (2, 16, 10, 24)


def test_every_peer_states_its_difference_and_absent_ones_are_known():
    assert set(available_peers()) == set(PEERS)
    for name, missing in available_peers().items():
        assert PEERS[name].differs.endswith(".")
        assert missing in (None, f"{PEERS[name].requires} is not installed")


def test_shapes_are_those_of_the_built_model():
    shapes = workloads.attention_shapes(config("retinanet_full_attn"), 640)
    towers = {s.height for s, names in shapes.items() if "head.cls_subnet.0.attention" in names}
    assert towers == {80, 40, 20, 10, 5}
    assert {s.height for s in shapes if s.in_channels != 256} == {160, 80, 40, 20}
    # The convolutions with which res3, res4 and res5 begin have a stride.
    strided = {(s.out_channels, s.height) for s in shapes if s.stride == 2}
    assert strided == {(128, 160), (256, 80), (512, 40)}
    # 16 blocks; on 5 levels, two subnets of 4 layers and 2 predictors.
    assert sum(map(len, shapes.values())) == 16 + 5 * 10


def test_contestants_take_turns_and_a_failing_one_does_not_stop_the_others():
    turns = []
    once = 1.2 * SHORTEST_SAMPLE  # is long enough for a sample

    def contestant(name, seconds=once):
        def step():
            turns.append(name)
            time.sleep(seconds)

        return lambda: Steps(step, step)

    def failing():
        raise RuntimeError("No such kernel. And more.")

    builds = {"a": contestant("a"), "b": failing, "c": contestant("c")}
    builds["slow"] = contestant("slow", once * SLOW * 1.5)
    seconds, failures = race(builds, SLOW_ROUNDS + 2, "cpu")
    assert failures == {"b": "No such kernel"}
    assert turns[-3 * SLOW_ROUNDS - 4 :] == ["a", "c", "slow"] * SLOW_ROUNDS + ["a", "c"] * 2
    assert [len(seconds[name]) for name in ("a", "c", "slow")] == [5, 5, 3]
    assert min(seconds["a"]) >= once


def test_out_of_memory_is_said_so():
    error = RuntimeError("Observed exception")
    error.__cause__ = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    assert reason(error) == "out of memory"
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert reason(caught.value) == "out of memory"


def build_allocation():
    # The warm-up starts the threads, which take memory of their own.
    return Steps(lambda: torch.ones(2**18), lambda: torch.ones(ALLOCATED // 4))


def build_failure():
    raise ValueError("It cannot be built.")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_peak_memory_is_that_of_the_step():
    peak = peak_memory(build_allocation, "cpu")
    assert not isinstance(peak, str), peak
    assert peak.step == pytest.approx(ALLOCATED, rel=0.05)
    assert peak.total > ALLOCATED
    assert peak_memory(build_failure, "cpu") == "It cannot be built"


@pytest.mark.parametrize("peer", [None, "eager unfold"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_detector_runs_with_every_implementation(peer, training):
    steps = build_detector(
        config("retinanet_full_attn"), 64, Setting(), "channels_last", training, peer
    )
    steps.warm_up()
    steps.step()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_detectors_run_as_they_are_compiled_and_with_their_norms_folded(training):
    configs = {name: config(name) for name in ("retinanet_conv", "retinanet_full_attn")}
    rows = {c.implementation: c for c in model_contestants(configs, 64, Setting(), training)}
    assert all(f"{name}, compiled" in rows for name in configs)
    assert all((f"{name}, norms folded" in rows) != training for name in configs)
    with torch.compiler.set_stance("force_eager"):  # compiling takes a minute; test_compile.py does
        rows["retinanet_full_attn, compiled"].build().step()
    model = compile_networks(build_model(configs["retinanet_conv"]))
    assert all(network._compiled_call_impl for network in (model.backbone, model.head))


def test_a_layer_runs_in_half_precision_and_pooled():
    shape = LayerShape(8, 8, 10, 12, 3, 2, stride=2)
    for name in (CONVOLUTION, OURS, "eager unfold"):
        output = workloads.make_layer(name, shape)(torch.randn(1, 8, 10, 12))
        assert output.shape == (1, 8, 5, 6)
        setting = Setting(dtype="bfloat16", batch=2)
        workloads.build_layer(name, shape, setting, "channels_last", True).step()


def test_our_other_backends_appear_by_themselves(monkeypatch):
    served = {"fast": backends.eager_stem, **backends._IMPLEMENTATIONS["local_attention"]}
    monkeypatch.setattr(backends.eager_stem, "refuses", lambda call: None)
    monkeypatch.setitem(backends._IMPLEMENTATIONS, "local_attention", served)
    monkeypatch.setitem(backends._UNAVAILABLE, "fast", lambda: None)
    monkeypatch.setitem(backends._UNAVAILABLE, "absent", lambda: "there is no such device")
    contestants = workloads.layer_contestants(LayerShape(8, 8, 6, 6, 3, 2), Setting(), False)
    ours = {c.implementation: c.backend for c in contestants if c.implementation != CONVOLUTION}
    assert ours[OURS] == "fast"
    assert ours[f"{OURS} (eager)"] == "eager"
    assert f"{OURS} (absent)" not in ours


def comparison(size, kernel_size, memory):
    case = {"batch": 1, "height": size, "width": size, "kernel_size": kernel_size}
    rows = [
        Row(name, "contiguous", seconds=[size**2 * 1e-6 * (i + 1)], memory=memory)
        for i, name in enumerate((CONVOLUTION, OURS))
    ]
    rows.append(Row("eager unfold", "contiguous", failure="out of memory"))
    return Comparison("scaling", "", "forward", case, CONVOLUTION, OURS, rows)


def test_charts_are_small_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    by_size = [comparison(size, 7, PeakMemory(size * 2**20, 0)) for size in (10, 20, 40)]
    by_window = [comparison(20, k, None) for k in (3, 5)]
    charts.draw_scaling(by_size, by_window, "One layer", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "chart.png").stat().st_size < 300_000


def test_what_was_not_measured_is_a_dash():
    cases = [comparison(size, 7, None) for size in (10, 20)]
    table = report.grid_table(
        cases, ["10", "20"], report.nanoseconds_a_position, first="map", growth=True
    )
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert cells[2] == ["10", "1,000 (1,000 to 1,000)", "2,000 (2,000 to 2,000)", "-"]
    assert cells[-1] == ["largest ÷ smallest", "1", "1", "-"]
    assert report.memory_ratio(cases[0], OURS) is None
    assert "| out of memory |" in " ".join(report.comparison_table(cases[0]).split())


def test_the_tool_writes_what_it_measured(tmp_path):
    options = "--suite layer --channels 16 --heads 2 --size 12 --rounds 4 --without-peers"
    command = [sys.executable, "tools/benchmark.py", *options.split(), "--output", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text = (tmp_path / "benchmark.md").read_text()
    assert text.strip() in run.stdout.replace("\n\n\n", "\n\n")
    assert "| time ÷ 3x3 convolution |" in " ".join(text.split())
    data = json.loads((tmp_path / "benchmark.json").read_text())
    assert data["environment"]["torch"] == torch.__version__
    assert [c["mode"] for c in data["comparisons"]] == ["forward", "forward+backward"]
    for case in data["comparisons"]:
        rows = {(row["implementation"], row["memory_format"]): row for row in case["rows"]}
        baseline = rows[tuple(case["baseline"])]["seconds_of_each_round"]
        assert case["baseline"][0] == CONVOLUTION
        assert len(baseline) == 4
        for row in rows.values():
            ratios = [a / b for a, b in zip(row["seconds_of_each_round"], baseline)]
            assert row["time_ratio_to_baseline"]["median"] == statistics.median(ratios)
        measured = [r["implementation"] for r in rows.values() if r["peak_memory_bytes"]]
        assert measured.count(CONVOLUTION) == measured.count(OURS) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--suite", "all"], "There is no suite 'all'; choose from layer, shapes, scaling, model."),
        (["--device", "tpu"], "The device must be cpu or cuda, but is 'tpu'."),
        (["--device", "cuda"], "There is no CUDA device here; use --device cpu."),
        (["--dtype", "int8"], "The dtype must be one of float32"),
        (["--output", "/proc/benchmark"], "The output folder '/proc/benchmark' cannot be written"),
        (["--rounds", "0"], "must be at least 1"),
        (["--kernel-sizes", "4"], "kernel_size must be odd"),
    ],
)
def test_wrong_options_get_one_sentence(options, message):
    if options == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    tool = load_tool()
    with pytest.raises(ValueError, match=r".") as caught:
        tool.check_args(tool.parse_args(options))
    assert message in str(caught.value)
