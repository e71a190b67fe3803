"""The paper's Table 1, Table 2 and ablations, ready to be counted and to take runs."""

from functools import cache, partial
from pathlib import Path
from typing import Any

from sasa_det.config import load_config
from sasa_det.evaluation import AP_NAMES
from sasa_det.modeling import make_sasa_resnet

from .flops import ModelCost, count_network
from .paper import (
    ABLATIONS,
    FPN_ROW,
    RESIDUAL,
    TABLE_1,
    TABLE_1_IMAGE_SIZE,
    TABLE_1_NUM_CLASSES,
    TABLE_2,
    TABLE_2_IMAGE_SIZE,
    TABLE_2_NUM_CLASSES,
    AblationRow,
    Table1Row,
)
from .reproduction import Counted, Row, Table, classifier_key, count_config
from .runs import Architecture, architecture

IMAGENET, COCO = "imagenet_val", "coco_2017_val"
TOP1 = ("top1",)


def table_1(dataset: str = IMAGENET, image_size: int = TABLE_1_IMAGE_SIZE) -> Table:
    """The nine classifiers."""
    rows = [
        Row(
            labels={"model": row.model, "ResNet": str(row.depth)},
            key=classifier_key(row.depth, row.stem, row.attention_stages),
            paper={"params_m": row.params_m, "gflops": row.gflops, "top1": row.top1},
            count=partial(_count_table_1, row, image_size),
        )
        for row in TABLE_1
    ]
    title = "Table 1: ResNets as ImageNet classifiers"
    return Table(title, rows, ("top1", "top5"), dataset, IMAGENET, TOP1)


def _count_table_1(row: Table1Row, image_size: int) -> list[Counted]:
    resnet = make_sasa_resnet(
        depth=row.depth,
        stem=row.stem,
        attention_stages=row.attention_stages,
        num_classes=TABLE_1_NUM_CLASSES,
    )
    scale = f"{image_size}x{image_size}, {TABLE_1_NUM_CLASSES} classes"
    return [Counted(scale, count_network(resnet, image_size))]


def table_2(configs: Path, dataset: str = COCO, image_size: int = TABLE_2_IMAGE_SIZE) -> Table:
    """The five detectors of the paper, and ours with attention in the FPN; ``configs`` has them."""
    rows = []
    for row in TABLE_2:
        labels = {"config": row.config, "heads": row.heads, "backbone": row.backbone}
        figures = (row.ap, row.ap50, row.ap75, row.ap_small, row.ap_medium, row.ap_large)
        costs = {"params_m": row.params_m, "gflops": row.gflops}
        paper: dict[str, float | None] = {**costs, **dict(zip(AP_NAMES, figures))}
        rows.append(_detector_row(configs, labels, paper, image_size))
    ours = dict(zip(("config", "heads", "backbone"), FPN_ROW))
    rows.append(_detector_row(configs, ours, None, image_size))
    title = "Table 2: RetinaNet with ResNet-50"
    return Table(title, rows, AP_NAMES, dataset, COCO, AP_NAMES)


def _detector_row(
    configs: Path, labels: dict[str, str], paper: dict[str, float | None] | None, image_size: int
) -> Row:
    classes = ["MODEL.RETINANET.NUM_CLASSES", str(TABLE_2_NUM_CLASSES)]
    cfg = load_config(str(configs / f"{labels['config']}.yaml"), classes)
    key = detector_key(architecture(cfg))
    return Row(labels, key, paper, lambda: [count_config(cfg, image_size)])


def detector_key(model: Architecture) -> dict[str, Any]:
    """What makes a row of Table 2; the window is the same in all of them, whatever its size."""
    key = model._asdict()
    del key["kernel_size"]
    return key


def ablations(
    configs: Path,
    dataset: str = COCO,
    image_size: int = TABLE_1_IMAGE_SIZE,
    detector_size: int = TABLE_2_IMAGE_SIZE,
) -> list[Table]:
    """What the paper varies of a ResNet-50, counted as a classifier and as a backbone.

    As the backbone of a RetinaNet with convolutional FPN and heads, ``retinanet_conv``.
    """

    @cache
    def rest_of_the_detector() -> ModelCost:
        cfg = load_config(str(configs / "retinanet_conv.yaml"), classes)
        resnet = _resnet(AblationRow("", attention_stages=()))
        pairs = zip(count_config(cfg, detector_size).cost, count_network(resnet, detector_size))
        return ModelCost(*(whole - part for whole, part in pairs))

    @cache
    def count(row: AblationRow) -> list[Counted]:
        classifier = count_network(_resnet(row, TABLE_1_NUM_CLASSES), image_size)
        pairs = zip(count_network(_resnet(row), detector_size), rest_of_the_detector())
        detector = ModelCost(*(part + rest for part, rest in pairs))
        of_a = f"{image_size}x{image_size}, {TABLE_1_NUM_CLASSES} classes"
        of_b = f"{detector_size}x{detector_size}, {TABLE_2_NUM_CLASSES} classes"
        return [Counted(f"classifier, {of_a}", classifier), Counted(f"RetinaNet, {of_b}", detector)]

    classes = ["MODEL.RETINANET.NUM_CLASSES", str(TABLE_2_NUM_CLASSES)]
    tables = []
    for varied, ablation in ABLATIONS.items():
        rows = [
            Row(
                {varied: row.name},
                _ablation_key(row),
                _published(row),
                partial(count, row._replace(name="")),
            )
            for row in ablation
        ]
        title = f"Ablation of ResNet-50: {varied}"
        tables.append(Table(title, rows, AP_NAMES, dataset, IMAGENET, TOP1))
    return tables


def backbone_key(model: Architecture) -> dict[str, Any]:
    """What makes a row of the ablations: of the backbone alone, whatever head and FPN are."""
    return {
        "stem": model.stem,
        "stem_mixed_values": model.stem_mixed_values,
        "attention_stages": model.attention_stages,
        "residual": model.residual,
        "kernel_size": model.kernel_size if model.attention_stages else None,
        "position": model.position if model.attention_stages or model.stem != "conv" else None,
    }


def _ablation_key(row: AblationRow) -> dict[str, Any]:
    mixed = row.stem_mixed_values if row.stem == "attention" else None
    model = Architecture(
        stem=row.stem,
        stem_mixed_values=mixed,
        attention_stages=row.attention_stages,
        residual=row.residual if row.attention_stages else None,
        head_attention=False,
        fpn_attention=False,
        kernel_size=row.kernel_size,
        position=row.position,
    )
    return backbone_key(model)


def _published(row: AblationRow) -> dict[str, float | None]:
    """Table 1's figures where the row is one of its ResNet-50s; the others nobody found."""
    varied: dict[str, Any] = {"name": "", "stem": "", "attention_stages": (), "residual": True}
    plain = row._replace(**varied) == AblationRow("", "", True, ())
    if row in ABLATIONS[RESIDUAL]:  # the paper has none
        plain = not row.residual
    for known in TABLE_1 if plain else ():
        if (known.depth, known.stem, known.attention_stages) == (
            50,
            row.stem,
            row.attention_stages,
        ):
            return {"params_m": known.params_m, "gflops": known.gflops, "top1": known.top1}
    return dict.fromkeys(("params_m", "gflops", "top1"))


def _resnet(row: AblationRow, num_classes: int | None = None) -> Any:
    return make_sasa_resnet(
        stem=row.stem,
        stem_mixed_values=row.stem_mixed_values,
        attention_stages=row.attention_stages,
        residual=row.residual,
        kernel_size=row.kernel_size,
        position=row.position,
        num_classes=num_classes,
    )
