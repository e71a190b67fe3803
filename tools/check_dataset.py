#!/usr/bin/env python
"""Checks a dataset in COCO's format, images included, and says what becomes of each fault.

    python tools/check_dataset.py --annotations train.json --images train
    python tools/check_dataset.py --annotations val.json --images val --evaluation
    python tools/check_dataset.py --dataset coco_2017_train --config configs/retinanet_conv.yaml
    python tools/check_dataset.py --config configs/retinanet_conv.yaml

With a config, its number of classes, its masks and its pixel format count too; without a dataset,
all of its DATASETS are checked. Any key of it can be changed at the end of the command. The exit
status is 1 if there is an error.
"""

import argparse
import os
import sys
from collections.abc import Iterable

from tqdm import tqdm

import sasa_det  # noqa: F401  (registers the datasets; before detectron2, see compat.py)

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from sasa_det.config import load_config
from sasa_det.data import check_datasets
from sasa_det.data.annotation_checks import check_annotations, describe
from sasa_det.data.annotation_file import AnnotationFile
from sasa_det.data.checks import coco_files
from sasa_det.data.findings import ERROR, SEVERITIES, Finding, Kind, Use, registered_classes
from sasa_det.data.image_checks import check_images

_EXAMPLES = 3


def main(args: argparse.Namespace) -> bool:
    """Prints a report on each dataset; whether none has an error.

    Raises:
        FileNotFoundError, ValueError: with one sentence for the user.
    """
    is_sound = True
    for json_file, image_root, use in datasets(args):
        data = AnnotationFile(json_file, image_root)
        print(describe(data), flush=True)
        findings = check_annotations(data, use)
        progress = tqdm(
            check_images(data, use, args.threads),
            total=len(data.images),
            unit=" images",
            disable=None,  # unless a person looks on
        )
        for of_image in progress:
            findings += of_image
        print(report(findings, use))
        is_sound &= not any(use.effect(finding.kind).severity == ERROR for finding in findings)
    return is_sound


def datasets(args: argparse.Namespace) -> list[tuple[str, str, Use]]:
    """Annotation file, image folder and use of what is to be checked."""
    cfg = load_config(args.config, args.opts) if args.config else None

    def use(training: bool, name: str = "") -> Use:
        if cfg is not None:
            return Use.of_config(cfg, training, name)
        return Use(training, registered_classes=registered_classes(name) if name else ())

    if args.annotations:
        if args.images and not os.path.isdir(args.images):
            raise FileNotFoundError(f"--images {args.images!r} is no folder.")
        return [(args.annotations, args.images, use(not args.evaluation))]
    if args.dataset:
        names = [(args.dataset, not args.evaluation)]
    else:
        names = [(name, True) for name in cfg.DATASETS.TRAIN if not args.evaluation]
        names += [(name, False) for name in cfg.DATASETS.TEST]
    return [(*registered(name), use(training, name)) for name, training in names]


def registered(name: str) -> tuple[str, str]:
    check_datasets([name])
    files = coco_files(name)
    if files is None:
        raise ValueError(
            f"The dataset {name!r} is not in COCO's format as detectron2's register_coco_instances "
            "registers it; only such can be checked."
        )
    if MetadataCatalog.get(name).get("generated"):
        DatasetCatalog.get(name)
    return files


def report(findings: Iterable[Finding], use: Use) -> str:
    """By severity and kind: how many, what becomes of them, the first of them."""
    by_kind: dict[Kind, list[Finding]] = {}
    for finding in findings:
        by_kind.setdefault(finding.kind, []).append(finding)
    what = "training" if use.training else "evaluation"
    totals, lines = [], []
    for severity in SEVERITIES:
        kinds = [kind for kind in by_kind if use.effect(kind).severity == severity]
        total = sum(len(by_kind[kind]) for kind in kinds)
        totals.append(f"{total:,} {severity}{'' if total == 1 else 's'}")
        for kind in kinds:
            found = by_kind[kind]
            lines.append(
                f"\n{severity}: {kind.name}, {len(found):,}; {what} {use.effect(kind).text}"
            )
            lines += [f"    {finding}" for finding in found[:_EXAMPLES]]
            if len(found) > _EXAMPLES:
                lines.append(f"    and {len(found) - _EXAMPLES:,} more")
    return "\n".join([f"For {what}: {', '.join(totals)}.", *lines]) + "\n"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--annotations", metavar="FILE", help="a COCO annotation file")
    source.add_argument("--dataset", metavar="NAME", help="a registered dataset")
    parser.add_argument("--images", metavar="FOLDER", help="where its images are, or ''")
    parser.add_argument("--config", metavar="FILE", help="what is to be trained or evaluated")
    parser.add_argument(
        "--evaluation", action="store_true", help="what evaluation makes of it, not training"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="that read images (default: %(default)s)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_args()
    if bool(args.annotations) != (args.images is not None):
        parser.error("--annotations FILE and --images FOLDER belong together")
    if not (args.annotations or args.dataset or args.config):
        parser.error("say what to check: --annotations and --images, --dataset, or --config")
    if args.opts and not args.config:
        parser.error(f"{args.opts[0]!r} changes a config, but there is no --config")
    if args.threads < 1:
        parser.error(f"--threads is {args.threads}, but one at least has to read")
    return args


if __name__ == "__main__":
    try:
        is_sound = main(parse_args())
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    sys.exit(0 if is_sound else 1)
