#!/usr/bin/env python
"""Writes the weights of a checkpoint, and nothing else of it, for others to load.

    python tools/extract_weights.py output/demo/model_final.pth demo.safetensors
    python tools/train_net.py --config configs/demo.yaml --eval-only MODEL.WEIGHTS demo.safetensors

The optimiser stays behind. A .safetensors file cannot hold code; .pth is what other projects
with detectron2 read. MODEL.WEIGHTS takes both.
"""

import argparse
import sys
from pathlib import Path

import sasa_det  # noqa: F401  (before detectron2, see compat.py)

# isort: split
from sasa_det.weight_files import check_suffix, model_of, read_weights, write_weights
from sasa_det.whole_files import check_overwriting, make_folder_of


def main() -> None:
    args = parse_args()
    check_suffix(args.output)
    if not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"The checkpoint {args.checkpoint!r} does not exist.")
    check_overwriting([args.checkpoint], [Path(args.output)])
    make_folder_of(Path(args.output))
    content = read_weights(args.checkpoint)
    tensors = model_of(content, args.checkpoint)
    heuristics = bool(content.get("matching_heuristics"))
    write_weights(tensors, args.output, matching_heuristics=heuristics)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    print(f"{len(tensors)} tensors with {numbers:,} numbers, for MODEL.WEIGHTS: {args.output}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .pth, .pkl or .safetensors file")
    parser.add_argument("output", help="a .safetensors or .pth file")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
