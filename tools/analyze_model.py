#!/usr/bin/env python
"""Counts the parameters and FLOPs of the detector that a config describes.

    python tools/analyze_model.py --config configs/retinanet_full_attn.yaml --json cost.json

Counted as the paper's Table 2 is, whatever the config trains: at 640x640 pixels, with 90 classes.
GFLOPs count a multiply and an add as two. "executed" is what is computed; "paper" counts q . r as
Eq. 3 is written, which the paper's figures do.
"""

import argparse
import json
import sys
from pathlib import Path

import sasa_det  # noqa: F401  (registers the models; before detectron2, see compat.py)

# isort: split
from detectron2.modeling import build_model
from tabulate import tabulate

from sasa_det.analysis import DetectorCost, count_detector
from sasa_det.analysis.paper import TABLE_2, TABLE_2_IMAGE_SIZE, TABLE_2_NUM_CLASSES, Table2Row
from sasa_det.config import load_config
from sasa_det.whole_files import make_folder_of


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="path to a config file")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="change keys of the config")
    args = parser.parse_args()
    fixed = ["MODEL.DEVICE", "cpu", "MODEL.RETINANET.NUM_CLASSES", str(TABLE_2_NUM_CLASSES)]
    cfg = load_config(args.config, [*args.opts, *fixed])
    if args.json:
        make_folder_of(args.json)
    cost = count_detector(build_model(cfg), TABLE_2_IMAGE_SIZE)
    paper = next((row for row in TABLE_2 if row.config == Path(args.config).stem), None)
    print(as_table(cost, paper))
    if args.json:
        args.json.write_text(json.dumps(as_json(args.config, cost, paper), indent=2) + "\n")


def as_table(cost: DetectorCost, paper: Table2Row | None) -> str:
    """One line a part, then the whole, then the paper's figure and the deviation from it."""
    lines: list[list] = []
    for name, part in {**cost.parts, "total": cost.total}.items():
        executed, dense = part.flops_executed / 1e9, part.flops_paper / 1e9
        lines.append([name, f"{part.params / 1e6:.2f}", f"{executed:.1f}", f"{dense:.1f}"])
    if paper is not None:
        params_off = cost.total.params / 1e6 / paper.params_m - 1
        flops_off = cost.total.flops_paper / 1e9 / paper.gflops - 1
        lines.append(["paper, Table 2", f"{paper.params_m}", "", f"{paper.gflops}"])
        lines.append(["deviation", f"{params_off:+.1%}", "", f"{flops_off:+.1%}"])
    headers = ["part", "params (M)", "GFLOPs executed", "GFLOPs paper"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", *["right"] * 3))


def as_json(config: str, cost: DetectorCost, paper: Table2Row | None) -> dict:
    return {
        "config": config,
        "image_size": TABLE_2_IMAGE_SIZE,
        "num_classes": TABLE_2_NUM_CLASSES,
        **cost.total._asdict(),
        "parts": {name: part._asdict() for name, part in cost.parts.items()},
        "paper": paper and {"gflops": paper.gflops, "params_m": paper.params_m},
    }


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
