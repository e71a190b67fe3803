"""What can be known about a dataset before a run starts."""

import functools
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from sasa_det.weight_files import read_weights

from .annotation_checks import check_annotations
from .annotation_file import AnnotationFile, garbage_collection_off
from .findings import ERROR, WARNING, Finding, Kind, Use


def check_datasets(names: Iterable[str]) -> None:
    """Checks that each dataset is registered and that its files are where they should be.

    Raises:
        ValueError: for a name that nobody registered.
        FileNotFoundError: for a missing annotation file or image folder, with the remedy.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise ValueError(
                f"No dataset is registered as {name!r}; register it with detectron2's "
                "register_coco_instances, or choose another in DATASETS.TRAIN and DATASETS.TEST."
            )
        metadata = MetadataCatalog.get(name)
        if metadata.get("generated"):
            continue
        for key in ("json_file", "image_root"):
            path = metadata.get(key)
            if path and not Path(path).exists():
                root = os.environ.get("DETECTRON2_DATASETS", "datasets")
                raise FileNotFoundError(
                    f"The dataset {name!r} needs {path}, which does not exist; set "
                    f"DETECTRON2_DATASETS (now {root!r}) to the folder that holds your datasets, "
                    "for COCO 2017 with coco/annotations, coco/train2017 and coco/val2017 in it."
                )


def check_config_datasets(cfg: CfgNode, training: bool) -> list[str]:
    """Checks the annotation files of DATASETS.TEST, and for training those of DATASETS.TRAIN.

    No image is opened. What is not in COCO's format is not looked into, nor what is generated on
    first use and not there yet.

    Returns:
        list[str]: a sentence for each kind of warning.

    Raises:
        ValueError: for the first dataset with an error, with one sentence.
        FileNotFoundError, ValueError: as :func:`check_datasets`; and for proposals of
            MODEL.LOAD_PROPOSALS, which are pickles, that would execute something.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        for path in (*cfg.DATASETS.PROPOSAL_FILES_TRAIN, *cfg.DATASETS.PROPOSAL_FILES_TEST):
            read_weights(path, ".pkl")
    warnings = []
    uses = [(name, True) for name in cfg.DATASETS.TRAIN] if training else []
    uses += [(name, False) for name in cfg.DATASETS.TEST]
    check_datasets([name for name, _ in uses])
    for name, is_training in uses:
        files = coco_files(name)
        if files is None or not Path(files[0]).is_file():
            continue
        stamp = Path(files[0]).stat()
        use = Use.of_config(cfg, is_training, name)
        findings = _check_once(*files, use, (stamp.st_mtime_ns, stamp.st_size))
        command = _full_check(*files, use)
        for severity in (ERROR, WARNING):
            sentences = _summaries(findings, use, severity, command)
            if severity == ERROR and sentences:
                raise ValueError(sentences[0])
            warnings += sentences
    return warnings


def coco_files(name: str) -> tuple[str, str] | None:
    """The annotation file and the image folder of a registered dataset in COCO's format."""
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if metadata.get("evaluator_type") != "coco" or json_file is None or image_root is None:
        return None
    return str(json_file), str(image_root)


@functools.lru_cache(maxsize=8)
def _check_once(
    json_file: str, image_root: str, use: Use, stamp: tuple[int, int]
) -> tuple[Finding, ...]:
    """Several runs of one process check an unchanged file once."""
    with garbage_collection_off():
        return tuple(check_annotations(AnnotationFile(json_file, image_root), use))


def _summaries(findings: Sequence[Finding], use: Use, severity: str, command: str) -> list[str]:
    """A sentence a kind: the first finding, how many there are, what comes of it, the command."""
    first: dict[Kind, Finding] = {}
    counts: Counter[Kind] = Counter()
    for finding in findings:
        first.setdefault(finding.kind, finding)
        counts[finding.kind] += 1
    sentences = []
    for kind, finding in first.items():
        effect = use.effect(kind)
        if effect is None or effect.severity != severity:
            continue
        more = f" ({counts[kind] - 1:,} more like it)" if counts[kind] > 1 else ""
        what = "training" if use.training else "evaluation"
        sentences.append(f"{finding}{more}, and {what} {effect.text}; list all with: {command}")
    return sentences


def _full_check(json_file: str, image_root: str, use: Use) -> str:
    """The command that finds the same, whatever the config's file and the dataset's name are."""
    words = ["--annotations", json_file, "--images", image_root]
    words += [] if use.training else ["--evaluation"]
    if use.num_classes_key:
        config = "base_retinanet" if "RETINANET" in use.num_classes_key else "faster_rcnn_attn"
        keys = [use.num_classes_key, str(use.num_classes), "INPUT.FORMAT", use.image_format]
        if use.mask_format:
            keys += ["MODEL.MASK_ON", "True", "INPUT.MASK_FORMAT", use.mask_format]
        words += ["--config", f"configs/{config}.yaml", *keys]
    return shlex.join(["python", "tools/check_dataset.py", *words])
