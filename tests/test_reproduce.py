"""``tools/reproduce.py``: which run is which row, what is refused, what is said of each figure."""

import csv
import io
import json
import sys
from dataclasses import asdict

import pytest

import sasa_det  # noqa: F401

# isort: split
from commands import run_tool
from conftest import CONFIGS, ROOT

from sasa_det.analysis import tables
from sasa_det.analysis.paper import ABLATIONS, TABLE_2
from sasa_det.analysis.reproduction import trained_classifier, trained_detector
from sasa_det.analysis.reproduction_report import as_csv, as_data, as_markdown
from sasa_det.analysis.runs import ClassifierRun, architecture, find_runs, read_run
from sasa_det.analysis.tradeoff import draw_tradeoff
from sasa_det.classification import ClassifierRecipe
from sasa_det.config import load_config

sys.path.insert(0, str(ROOT / "tools"))
import reproduce

DIGITS = "sasa_digits_val"
FIGURES = {"AP": 36.0, "AP50": 54.0, "AP75": 39.0, "APs": 18.0, "APm": 40.0, "APl": None}


def make_run(folder, config, *overrides, dataset=tables.COCO, ap=36.0, seed=0, last=2999):
    """A run of the demo's size in the architecture of ``config``, as its training leaves it."""
    sasa = load_config(str(CONFIGS / f"{config}.yaml")).MODEL.SASA
    row = ("STEM", "ATTENTION_STAGES", "HEAD_ATTENTION", "FPN_ATTENTION")
    keys = [text for key in row for text in (f"MODEL.SASA.{key}", str(sasa[key]))]
    own = ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    cfg = load_config(str(CONFIGS / "demo.yaml"), [*keys, *own, *overrides])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    log = [{"iteration": 19, "total_loss": 1.0}, {"iteration": last, "bbox/AP": ap}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, log)) + '\n{"iterat')
    results = {dataset: {"bbox": {**FIGURES, "AP": ap}}}
    (folder / "evaluation.json").write_text(json.dumps(results))
    return folder


def read(*folders, key=tables.detector_key):
    return [trained_detector(read_run(folder), key) for folder in find_runs(folders)]


def small_table_2(**options):
    return tables.table_2(CONFIGS, image_size=64, **options)


def test_a_run_is_the_row_that_its_config_says_wherever_it_lies(tmp_path):
    names = [row.labels["config"] for row in small_table_2().rows]
    assert names == [*(row.config for row in TABLE_2), "retinanet_full_attn_fpn"]
    for depth, name in enumerate(reversed(names)):
        make_run(tmp_path / "/".join("abc"[: depth % 3]) / f"run{depth}", name)
    table = small_table_2()
    assert table.add(read(tmp_path)) == []
    found = {row.labels["config"]: [run.folder.name for run in row.runs] for row in table.rows}
    assert found == {name: [f"run{depth}"] for depth, name in enumerate(reversed(names))}
    assert table.warnings == []


@pytest.mark.parametrize(
    "overrides",
    [
        ["MODEL.SASA.POSITION", "none"],
        ["MODEL.SASA.STEM_MIXED_VALUES", "False"],
        ["MODEL.SASA.BOTTLENECK_RESIDUAL", "False"],
        ["MODEL.SASA.ATTENTION_STAGES", "('res5',)"],
        ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
    ],
    ids=lambda x: x[0],
)
def test_what_is_no_row_is_in_none(tmp_path, overrides):
    make_run(tmp_path / "run", "retinanet_full_attn", *overrides)
    table = small_table_2()
    assert len(table.add(read(tmp_path))) == 1
    assert not any(row.runs for row in table.rows)


@pytest.mark.parametrize(("varied", "row"), [(v, r) for v, rows in ABLATIONS.items() for r in rows])
def test_the_rows_of_the_ablations_are_recognised_with_either_head(varied, row):
    (table,) = (t for t in tables.ablations(CONFIGS) if varied in t.rows[0].labels)
    sasa = {
        "STEM": row.stem,
        "STEM_MIXED_VALUES": row.stem_mixed_values,
        "ATTENTION_STAGES": row.attention_stages,
        "BOTTLENECK_RESIDUAL": row.residual,
        "KERNEL_SIZE": row.kernel_size,
        "POSITION": row.position,
    }
    overrides = [text for key, x in sasa.items() for text in (f"MODEL.SASA.{key}", str(x))]
    for config in ("retinanet_full_attn", "retinanet_conv"):
        key = tables.backbone_key(
            architecture(load_config(str(CONFIGS / f"{config}.yaml"), overrides))
        )
        assert [r.labels[varied] for r in table.rows if r.key == key] == [row.name]


def test_seeds_make_a_mean_with_its_spread_beside_the_papers_figure(tmp_path):
    for seed, ap in enumerate([36.0, 37.0, 38.0]):
        make_run(tmp_path / f"seed{seed}", "retinanet_conv", ap=ap, seed=seed)
    table = small_table_2()
    table.add(read(tmp_path))
    row = table.rows[0]
    assert table.measured(row, "AP") == (37.0, 1.0, 3)
    assert table.measured(row, "APl") is None  # COCO had no figure
    assert table.difference(row, "AP") == pytest.approx(0.5)  # the paper has 36.5
    cost, paper = row.counted[0].cost, TABLE_2[0]
    assert row.deviations() == {
        "params_m": cost.params / 1e6 / paper.params_m - 1,
        "gflops": cost.flops_paper / 1e9 / paper.gflops - 1,
    }
    trained = row.counted_as_trained
    assert trained.scale == "128x128, 10 classes"
    assert trained.cost.params < cost.params / 10


def test_every_figure_says_where_it_comes_from(tmp_path):
    make_run(tmp_path / "a", "retinanet_conv", dataset=DIGITS)
    make_run(tmp_path / "b", "retinanet_full_attn_fpn", dataset=DIGITS, ap=31.0)
    table = small_table_2(dataset=DIGITS)
    table.add(read(tmp_path))

    text = as_markdown(table)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert f"{DIGITS}, mean ± standard deviation over seeds, which is not the paper's" in text
    assert sum(line[3:5] == ["paper: coco_2017_val", "36.5"] for line in lines) == 1
    assert sum(line[3:5] == [f"measured: {DIGITS}, seeds: 1", "36.0"] for line in lines) == 1
    assert sum(line[3:5] == [f"measured: {DIGITS}", "not measured"] for line in lines) == 4
    assert sum(line[3:5] == ["paper: coco_2017_val", "not in the paper"] for line in lines) == 1
    assert "measured - paper" not in text

    rows = list(csv.DictReader(io.StringIO(as_csv([table]))))
    row = {(r["figure"], r["source"]): r for r in rows if r["row"].startswith("retinanet_conv,")}
    assert row["AP", "paper"]["value"] == "36.5"
    assert row["AP", "paper"]["on"] == "coco_2017_val"
    assert row["AP", "measured"]["value"] == "36.0"
    assert (row["AP", "measured"]["on"], row["AP", "measured"]["seeds"]) == (DIGITS, "1")
    assert row["APl", "not measured"]["value"] == ""
    assert row["AP", "measured"]["deviation"] == ""
    assert row["params_m", "counted"]["on"] == "64x64, 90 classes"
    assert abs(float(row["params_m", "counted"]["deviation"])) < 0.005
    assert row["params_m", "counted as trained"]["on"] == "128x128, 10 classes"

    data = as_data(table)["rows"]
    assert data[0]["measured"]["AP"] == {"mean": 36.0, "deviation": None, "seeds": 1}
    assert data[0]["measured_minus_paper"] == {}
    assert data[1]["measured"] is None
    assert data[5]["paper"] is None
    assert data[5]["runs"][0]["folder"] == str(tmp_path / "b")

    chart = io.BytesIO()
    assert draw_tradeoff([table], chart)
    assert chart.getvalue().startswith(b"\x89PNG")


def test_rows_trained_differently_get_one_warning_and_seeds_must_be_alike(tmp_path):
    first = make_run(tmp_path / "a", "retinanet_conv")
    make_run(tmp_path / "b", "retinanet_full_attn", "MODEL.SASA.KERNEL_SIZE", "7", last=99)
    twice = make_run(tmp_path / "c", "retinanet_conv", "SOLVER.MAX_ITER", "50", last=50)
    table = small_table_2()
    table.add(read(tmp_path / "b", twice))
    (warning,) = table.warnings
    assert "SOLVER.MAX_ITER: 50 or 3000" in warning
    assert "MODEL" not in warning  # of the window the baseline has none
    with pytest.raises(ValueError, match=r"'.*/a' and '.*/c' are both .*MAX_ITER: 3000 or 50"):
        small_table_2().add(read(first, twice))


def test_classifiers_of_different_recipes_are_no_seeds_of_one_training(tmp_path):
    def run(seed, **options):
        recipe = ClassifierRecipe(seed=seed, **options)
        model = {**asdict(recipe), "epochs_trained": recipe.epochs}
        return trained_classifier(ClassifierRun(tmp_path / str(seed), model, {"a_val": {}}))

    table = tables.table_1(dataset="a_val")
    assert table.add([run(0), run(1)]) == []
    with pytest.raises(ValueError, match=r"differ in weight_decay: 0.0001 or 0.001"):
        table.add([run(2, weight_decay=1e-3)])


def test_only_a_finished_training_is_measured(tmp_path):
    early = make_run(tmp_path / "early", "retinanet_conv", last=1499)
    assert "those after 1500 of 3000 iterations" in read_run(early).unfinished
    done = make_run(tmp_path / "done", "retinanet_conv", last=3000)  # as detectron2 counts
    assert read_run(done).unfinished is None
    (done / "evaluation.json").unlink()
    assert "has no evaluation.json" in read_run(done).unfinished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--runs", "{0}"],
            r"evaluation.json' has figures of sasa_digits_val, not of coco_2017_va",
        ),
        (["--runs", "{0}/nowhere"], "nowhere' does not exist"),
        (["--runs", "{0}", "--dataset", "sasa_val"], r"not of sasa_val.*give --dataset sasa_digi"),
    ],
)
def test_what_must_not_stand_in_the_table_is_refused_before_anything_is_written(
    tmp_path, arguments, message
):
    make_run(tmp_path / "run", "retinanet_conv", dataset=DIGITS)
    filled = [argument.format(tmp_path) for argument in arguments]
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        reproduce.main(["table2", *filled, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_file_that_makes_no_sense_is_named(tmp_path):
    run = make_run(tmp_path / "run", "retinanet_conv")
    (run / "evaluation.json").write_text('{"coco_2017_val": {"bbox": 36}}')
    with pytest.raises(ValueError, match=r"run/evaluation.json' is not \{dataset: \{task"):
        read_run(run)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"run/evaluation.json' is no JSON"):
        read_run(run)


def test_the_tool_counts_table_1_and_reads_classifiers(tmp_path):
    model = {"depth": 26, "stem": "conv", "attention_stages": [], "width": 16, "image_size": 32}
    model = {**model, "num_classes": 9, "epochs": 8}
    for name, trained in {"a": {}, "b": {}, "c": {"epochs_trained": 7}}.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        figures = {"classification": {"top1": 70.0, "top5": 90.0}, "model": {**model, **trained}}
        (folder / "evaluation.json").write_text(json.dumps({"nine_val": figures}))
        if name != "b":
            (folder / "model_final.pth").touch()
    options = ["--runs", tmp_path / "runs", "--dataset", "nine_val", "--output", tmp_path / "out"]
    run = run_tool("tools/reproduce.py", "table1", *options)
    assert run.returncode == 0, run.stderr
    assert "runs/b' has no model_final.pth, so it is not finished" in run.stderr
    assert "runs/c' has figures after 7 of 8 epochs, so it is not finished" in run.stderr
    files = {f"table1.{kind}" for kind in ("md", "csv", "json", "png")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "table1.md").read_text() in run.stdout + "\n"

    (part,) = json.loads((tmp_path / "out" / "table1.json").read_text())["parts"]
    assert len(part["rows"]) == 9
    for row in part["rows"]:
        assert all(abs(deviation) < 0.015 for deviation in row["deviation"].values())
        assert row["counted"][0]["scale"] == "224x224, 1000 classes"
    assert part["rows"][0]["measured"]["top1"]["mean"] == 70.0
    assert part["rows"][0]["counted_as_trained"]["scale"] == "32x32, 9 classes"
    assert part["rows"][1]["measured"] is None
