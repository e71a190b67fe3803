#!/usr/bin/env python
"""Puts the paper's tables beside what is counted on this package's models and measured in runs.

    python tools/reproduce.py table1
    python tools/reproduce.py table2 --runs output/full output/conv
    python tools/reproduce.py ablations --runs output/ablations --dataset sasa_digits_val

Tables: "table1", ImageNet classifiers; "table2", RetinaNet on COCO; "ablations", the stages that
attend, the window, the positions and the stem. --runs takes output folders of tools/train_net.py
(for table1 those of tools/train_classifier.py), or folders that hold such folders; which row a run
is says its config, not its name. Several runs of a row are its seeds. Markdown, CSV, JSON and a
chart of accuracy against GFLOPs and parameters are written to the output folder.
"""

import argparse
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import sasa_det  # noqa: F401  (registers the models; before detectron2, see compat.py)

# isort: split
from sasa_det.analysis import tables
from sasa_det.analysis.reproduction import Table, Trained, trained_classifier, trained_detector
from sasa_det.analysis.reproduction_report import as_csv, as_data, as_markdown
from sasa_det.analysis.runs import find_runs, read_classifier, read_run
from sasa_det.analysis.tradeoff import draw_tradeoff
from sasa_det.evaluation import RESULTS_FILE

CONFIGS = Path(__file__).parent.parent / "configs"


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    selected = make_tables(args.table, args.dataset)
    # Before anything is counted, which takes a while: what is wrong with a run is said at once.
    warnings = add_runs(args.table, selected, args.runs)
    for table in selected:
        warnings += table.warnings
    for warning in dict.fromkeys(warnings):
        print(f"warning: {warning}", file=sys.stderr)
    for table in selected:
        for row in table.rows:
            print(f"counting: {table.title}: {row.name} ...", file=sys.stderr)
            _ = row.counted, row.counted_as_trained
    text = "\n\n".join(as_markdown(table) for table in selected) + "\n"
    print(text)
    written = write(args.table, selected, text, args.output)
    print(f"Written to {args.output}: {', '.join(written)}.", file=sys.stderr)


def make_tables(name: str, dataset: str | None) -> list[Table]:
    options = {"dataset": dataset} if dataset else {}
    if name == "table1":
        return [tables.table_1(**options)]
    if name == "table2":
        return [tables.table_2(CONFIGS, **options)]
    return tables.ablations(CONFIGS, **options)


def add_runs(name: str, selected: list[Table], folders: list[Path]) -> list[str]:
    """Puts the finished runs into the tables; says of the others why they are in none.

    Raises:
        FileNotFoundError, ValueError: for a run that cannot be read or must not be in its row.
    """
    runs, warnings = (
        read_classifiers(folders) if name == "table1" else read_detectors(name, folders)
    )
    rests = [table.add(runs) for table in selected]
    for run in runs:
        if all(any(run is other for other in rest) for rest in rests):
            what = ", ".join(f"{key} {value}" for key, value in (run.row or {}).items())
            why = what or "it is none of the models there"
            warnings.append(f"The run {str(run.folder)!r} is in no row of {name}: {why}.")
    return warnings


def read_detectors(name: str, folders: list[Path]) -> tuple[list[Trained], list[str]]:
    key = tables.detector_key if name == "table2" else tables.backbone_key
    runs = [read_run(folder) for folder in find_runs(folders)]
    finished = [trained_detector(run, key) for run in runs if run.unfinished is None]
    return finished, [run.unfinished for run in runs if run.unfinished is not None]


def read_classifiers(folders: list[Path]) -> tuple[list[Trained], list[str]]:
    finished, warnings = [], []
    for folder in find_runs(folders, RESULTS_FILE):
        run = read_classifier(folder)
        if run is None:
            warnings.append(f"The run {str(folder)!r} is no classifier's.")
        elif run.unfinished:
            warnings.append(run.unfinished)
        else:
            finished.append(trained_classifier(run))
    return finished, warnings


def write(name: str, selected: list[Table], text: str, output: Path) -> list[str]:
    """Writes everything, each file whole or not at all; returns their names."""
    chart = io.BytesIO()
    data = {"table": name, "parts": [as_data(table) for table in selected]}
    files = {
        f"{name}.md": text.encode(),
        f"{name}.csv": as_csv(selected).encode(),
        f"{name}.json": (json.dumps(data, indent=1) + "\n").encode(),
    }
    if draw_tradeoff(selected, chart):
        files[f"{name}.png"] = chart.getvalue()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        for file in files:
            os.replace(Path(folder) / file, output / file)
    return list(files)


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=("table1", "table2", "ablations"))
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], metavar="FOLDER", help="finished trainings"
    )
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"what they were evaluated on (default: {tables.COCO}, for table1 {tables.IMAGENET})",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/reproduce"),
        help="the folder to write to (default: %(default)s)",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
