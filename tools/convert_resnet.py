#!/usr/bin/env python
"""Makes a start for an attention model out of a trained convolutional one.

    python tools/convert_resnet.py --weights resnet50.pth --output start.pth \
        --config configs/retinanet_convstem_attn.yaml
    python tools/convert_resnet.py --weights resnet50.pth --output start.pth \
        --config configs/retinanet_convstem_attn.yaml --distill datasets/coco/train2017
    python tools/train_net.py --config configs/retinanet_convstem_attn.yaml MODEL.WEIGHTS start.pth

Takes torchvision's ResNets, detectron2's R-50.pkl, and detectors of detectron2 and of this package.
What has a counterpart in the model of the config is copied; with --distill each attention layer is
then fitted to the convolution whose place it takes, on images without annotations.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

import sasa_det  # noqa: F401  (registers the models; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from tabulate import tabulate

from sasa_det.config import load_config
from sasa_det.warm_start import (
    LayerError,
    Source,
    convert,
    distill,
    find_images,
    measure_norms,
    read_checkpoint,
)
from sasa_det.weight_files import check_suffix, write_weights
from sasa_det.whole_files import check_overwriting, make_folder_of


def main() -> None:
    args = parse_args()
    cfg = setup(args)
    images = find_images(args.distill) if args.distill else []
    source = read_checkpoint(args.weights)
    if args.only_resnet:
        source = source.resnet()
    notes = remarks(source, cfg, bool(images))
    seed_all_rng(max(cfg.SEED, 0))
    if images and source.has_folded_norms():
        source = measure_norms(source, cfg, images, args.batch_size)
    model = build_model(cfg)
    conversion = convert(model, source, cfg)
    errors = []
    if images:
        print(f"Fitting to {args.weights} on {len(images)} images, {args.steps} steps:")
        options = {"steps": args.steps, "batch_size": args.batch_size}
        errors = distill(model, source, cfg, images, **options)
        conversion.fit(error.name for error in errors)
    write_weights(conversion.tensors(model), args.output)
    print(conversion.table())
    if errors:
        print(f"\n{as_table(errors)}")
    for note in notes:
        print(f"\n{note}")
    print(f"\nWritten for MODEL.WEIGHTS: {args.output}")


def as_table(errors: list[LayerError]) -> str:
    lines = [[error.name, f"{error.before:.3f}", f"{error.after:.3f}"] for error in errors]
    headers = ["relative error on unseen images", "before", "after"]
    return tabulate(lines, headers, disable_numparse=True, colalign=("left", "right", "right"))


def remarks(source: Source, cfg: CfgNode, measured: bool) -> list[str]:
    """What the checkpoint does not say, or the model cannot take over."""
    found = []
    if source.pixels is None:
        found.append(
            f"It is {source.kind}, which does not say how it takes in pixels: as the config does, "
            f"it is assumed (INPUT.FORMAT {cfg.INPUT.FORMAT}, PIXEL_STD {cfg.MODEL.PIXEL_STD})."
        )
    if source.has_folded_norms() and not measured and cfg.MODEL.RESNETS.NORM != "FrozenBN":
        found.append(
            "Its batch norms come without statistics: they mean the same in evaluation and with "
            f"MODEL.RESNETS.NORM FrozenBN, but not when {cfg.MODEL.RESNETS.NORM} trains; --distill "
            "measures statistics for it."
        )
    return found


def setup(args: argparse.Namespace) -> CfgNode:
    """The checked config; all that can be known to fail is said before anything is computed."""
    cfg = load_config(args.config, args.opts)
    output = Path(args.output)
    check_suffix(args.output)
    check_overwriting([args.weights], [output])
    make_folder_of(output)
    if args.steps < 1 or args.batch_size < 1:
        raise ValueError("--steps and --batch-size must be positive.")
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.defrost()
        cfg.MODEL.DEVICE = "cpu"
        cfg.freeze()
    return cfg


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="what to start from")
    parser.add_argument("--config", required=True, metavar="FILE", help="the attention model's")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the start, a .pth or .safetensors file"
    )
    parser.add_argument(
        "--only-resnet", action="store_true", help="leave out FPN and head of the checkpoint"
    )
    parser.add_argument(
        "--distill",
        metavar="IMAGES",
        help="fit the attention on a folder, a text file with one path a line, or the name of a "
        "registered dataset",
    )
    parser.add_argument("--steps", type=int, default=1000, help="of fitting (default: 1000)")
    parser.add_argument("--batch-size", type=int, default=4, help="images a step (default: 4)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="change keys of the config")
    return parser.parse_args()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
