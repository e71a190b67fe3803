#!/usr/bin/env python
"""Exports a trained detector as ONNX or as a program of torch.export, and checks what it wrote.

    python tools/export_model.py --config configs/retinanet_full_attn.yaml --output model.onnx \
        MODEL.WEIGHTS output/model_final.pth
    python tools/export_model.py --config configs/retinanet_full_attn.yaml --output model.pt2 \
        MODEL.WEIGHTS output/model_final.pth

A RetinaNet is exported up to its boxes and scores, any other detector up to the maps of its
backbone; both for any batch, height and width. docs/deployment.md says what goes in and comes out.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import sasa_det  # noqa: F401  (registers the models; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate

from sasa_det.analysis.timing import Steps, race, spread
from sasa_det.checkpoint import check_weights
from sasa_det.config import load_config
from sasa_det.deployment import (
    ExportedNetwork,
    export_onnx,
    export_program,
    network_of,
    open_onnx,
    run_onnx,
)
from sasa_det.deployment.export import METADATA_KEY, require
from sasa_det.prediction import load_metadata, load_model, split_overrides
from sasa_det.whole_files import check_overwriting, make_folder_of, whole_file

# Of what eager computes, in the norm over all values of an output.
TOLERANCE = 1e-4
ROUNDS = 5
# Where INPUT.MIN_SIZE_TEST is 0 and pictures keep their size.
SIDE = 640

Run = Callable[[Tensor], list[Tensor]]


def main() -> None:
    args = parse_args()
    output = Path(args.output)
    check_arguments(args)
    check_overwriting(args.beside, [output])
    others = {path: runner(path) for path in args.beside}
    make_folder_of(output)
    cfg = load_config(args.config, [*args.opts, "MODEL.DEVICE", "cpu"])
    network = network_of(trained_or_random(cfg))
    about = metadata(cfg, network)
    side = cfg.INPUT.MIN_SIZE_TEST or SIDE
    print(f"Exporting {args.config}: this takes a minute or more.", flush=True)
    try:
        with whole_file(output) as beside:
            if output.suffix == ".onnx":
                exported = write_onnx(network, beside, about)
            else:
                exported = write_program(network, beside, about, args.keep_operators)
            check(compare(network, exported, side), network, judged=bool(cfg.MODEL.WEIGHTS))
    except OSError as error:
        raise ValueError(f"The file {args.output!r} cannot be written: {error}") from error
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")
    contestants: dict[str, Run] = {"eager": lambda x: list(network(x)), output.name: exported}
    print(latencies({**contestants, **others}, network.channels, side))


def write_onnx(network: ExportedNetwork, path: Path, about: dict[str, Any]) -> Run:
    export_onnx(network, path, about)
    session = open_onnx(path)
    return lambda images: run_onnx(session, images)


def write_program(
    network: ExportedNetwork, path: Path, about: dict[str, Any], keep_operators: bool
) -> Run:
    program = export_program(network, keep_operators=keep_operators)
    content = io.BytesIO()  # what torch writes to a file itself fails without the reason
    torch.export.save(program, content, extra_files={METADATA_KEY: json.dumps(about)})
    path.write_bytes(content.getbuffer())
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda images: list(module(images))


def check(differences: list[list[str]], network: ExportedNetwork, *, judged: bool) -> None:
    """Prints them; raises ValueError if they are to be judged and one is too great."""
    print(tabulate(differences, ["images", *network.output_names], disable_numparse=True))
    # Not max(), which drops what is not a number.
    greatest = torch.tensor([float(x) for row in differences for x in row[1:]]).max().item()
    print(f"Greatest difference from eager: {greatest:.1e} (relative, in the norm of an output)")
    if judged and not greatest <= TOLERANCE:
        raise ValueError(
            f"What was exported differs from eager by {greatest:.1e}, more than {TOLERANCE}; it is "
            "not kept."
        )


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ValueError, ImportError or FileNotFoundError for what cannot be done, at once."""
    suffix = Path(args.output).suffix
    if suffix not in (".onnx", ".pt2"):
        raise ValueError(
            f"--output must end in .onnx or .pt2, which says what to write, but is {args.output!r}."
        )
    if args.keep_operators and suffix == ".onnx":
        raise ValueError("--keep-operators is for .pt2 files: ONNX Runtime lacks the operators.")
    if suffix == ".onnx" or args.beside:
        require("onnx", "onnxscript", "onnxruntime")
    for path in args.beside:
        if not Path(path).is_file():
            raise FileNotFoundError(f"The file {path!r} of --beside does not exist.")


def trained_or_random(cfg: CfgNode) -> nn.Module:
    if cfg.MODEL.WEIGHTS:
        check_weights(cfg.MODEL.WEIGHTS, cfg)
        return load_model(cfg)
    print(
        "MODEL.WEIGHTS is empty: random weights are exported. Such a network can amplify "
        "roundings a thousandfold, so the differences below are printed, not judged."
    )
    return build_model(cfg.clone()).eval()


def metadata(cfg: CfgNode, network: ExportedNetwork) -> dict[str, Any]:
    """What stands outside the network and is to be done alike: kept inside the ONNX file."""
    classes = list(load_metadata(cfg).get("thing_classes", []))
    if "scores" in network.output_names and len(classes) != cfg.MODEL.RETINANET.NUM_CLASSES:
        print(
            f"The model has {cfg.MODEL.RETINANET.NUM_CLASSES} classes, but the config's datasets "
            f"name {len(classes) or 'none'}, and so does the file; set DATASETS.TEST to what it "
            "was trained for."
        )
    retinanet = cfg.MODEL.RETINANET
    return {
        "format": cfg.INPUT.FORMAT,
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "score_threshold": retinanet.SCORE_THRESH_TEST,
        "candidates": retinanet.TOPK_CANDIDATES_TEST,
        "nms_threshold": retinanet.NMS_THRESH_TEST,
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "classes": classes,
    }


def runner(path: str) -> Run:
    """Raises ValueError for what is no ONNX file."""
    try:
        session = open_onnx(Path(path))
    except Exception as error:  # of one of ONNX Runtime's many classes
        reason = " ".join(str(error).split())
        raise ValueError(f"ONNX Runtime cannot open {path!r} of --beside: {reason}") from error
    return lambda images: run_onnx(session, images)


@torch.no_grad()
def compare(network: ExportedNetwork, exported: Run, side: int) -> list[list[str]]:
    """At three sizes, one of them not divisible: the relative difference of each output."""
    rows = []
    for n, height, width in ((1, side, side), (1, 3 * side // 4, side + 1), (2, side, side // 2)):
        height, width = (max(size, network.max_stride + 1) for size in (height, width))
        images = torch.rand(n, network.channels, height, width) * 255
        pairs = zip(network(images), exported(images))
        differences = [
            ((a.double() - e.double()).norm() / e.double().norm().clamp(1e-30)).item()
            for e, a in pairs
        ]
        size = "x".join(map(str, images.shape))
        rows.append([size, *(f"{x:.1e}" for x in differences)])
    return rows


@torch.no_grad()
def latencies(contestants: dict[str, Run], channels: int, side: int) -> str:
    images = torch.rand(1, channels, side, side) * 255
    builds = {
        name: (lambda run=run: Steps(lambda: None, lambda: run(images)))
        for name, run in contestants.items()
    }
    seconds, failures = race(builds, ROUNDS, "cpu")
    rows = []
    for name, times in seconds.items():
        ratio = spread([t / e for t, e in zip(times, seconds["eager"])]).median
        rows.append([name, f"{1e3 * spread(times).median:.0f} ms", f"{ratio:.2f}"])
    rows += [[name, reason, ""] for name, reason in failures.items()]
    headers = [f"{side}x{side}, {torch.get_num_threads()} threads", "latency", "÷ eager"]
    return tabulate(rows, headers, disable_numparse=True)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="path to a config file")
    parser.add_argument("--output", required=True, metavar="FILE", help="model.onnx or model.pt2")
    parser.add_argument(
        "--keep-operators",
        action="store_true",
        help="leave sasa_det's operators in a .pt2, which is faster where sasa_det is installed",
    )
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        metavar="FILE",
        help="ONNX files of before, timed in the same rounds",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="change keys of the config")
    args = parser.parse_args()
    args.beside, after_beside = split_overrides(args.beside)
    args.opts += after_beside
    return args


if __name__ == "__main__":
    try:
        main()
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
