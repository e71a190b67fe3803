"""The tables of "Stand-Alone Self-Attention in Vision Models" (arXiv 1906.05909) as data."""

from typing import NamedTuple

from sasa_det.config import STAGES


class Table1Row(NamedTuple):
    """ImageNet classification at 224x224; GFLOPs count a multiply and an add as two."""

    model: str
    depth: int
    stem: str
    attention_stages: tuple[str, ...]
    gflops: float
    params_m: float
    top1: float


class Table2Row(NamedTuple):
    """RetinaNet with ResNet-50 on COCO 2017."""

    config: str
    heads: str
    backbone: str
    gflops: float
    params_m: float
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float


class AblationRow(NamedTuple):
    """A ResNet-50; what it is where a table of ablations varies something else."""

    name: str
    stem: str = "conv"
    stem_mixed_values: bool = True
    attention_stages: tuple[str, ...] = STAGES
    kernel_size: int = 7
    residual: bool = True
    position: str = "relative"


TABLE_1 = (
    Table1Row("baseline", 26, "conv", (), 4.7, 13.7, 74.5),
    Table1Row("baseline", 38, "conv", (), 6.5, 19.6, 76.2),
    Table1Row("baseline", 50, "conv", (), 8.2, 25.6, 76.9),
    Table1Row("conv stem + attention", 26, "conv", STAGES, 4.5, 10.3, 75.8),
    Table1Row("conv stem + attention", 38, "conv", STAGES, 5.7, 14.1, 77.1),
    Table1Row("conv stem + attention", 50, "conv", STAGES, 7.0, 18.0, 77.4),
    Table1Row("full attention", 26, "attention", STAGES, 4.7, 10.3, 74.8),
    Table1Row("full attention", 38, "attention", STAGES, 6.0, 14.1, 76.9),
    Table1Row("full attention", 50, "attention", STAGES, 7.2, 18.0, 77.6),
)

TABLE_1_IMAGE_SIZE = 224
TABLE_1_NUM_CLASSES = 1000

# What the paper does not print, and its figures imply: 640x640 images, 90 category ids, 6 anchors a
# location, the FPN's 3x3 convolutions kept in all rows, q . r counted as Eq. 3 is written.
TABLE_2_IMAGE_SIZE = 640
TABLE_2_NUM_CLASSES = 90
# fmt: off
TABLE_2 = (
    Table2Row("retinanet_conv", "conv", "baseline ResNet-50",
              182, 33.4, 36.5, 54.3, 39.0, 18.3, 40.6, 51.7),
    Table2Row("retinanet_convstem_attn_backbone", "conv", "conv stem + attention",
              173, 25.9, 36.8, 54.6, 39.3, 18.4, 41.1, 51.7),
    Table2Row("retinanet_full_attn_backbone", "conv", "full attention",
              173, 25.9, 36.2, 54.0, 38.7, 17.5, 40.3, 51.7),
    Table2Row("retinanet_convstem_attn", "attention", "conv stem + attention",
              111, 22.0, 36.6, 54.3, 39.1, 19.0, 40.7, 51.1),
    Table2Row("retinanet_full_attn", "attention", "full attention",
              110, 22.0, 36.6, 54.5, 39.2, 18.5, 40.6, 51.6),
)
# fmt: on
# Ours, beyond the paper: config, heads, backbone.
FPN_ROW = ("retinanet_full_attn_fpn", "attention, FPN too", "full attention")

RESIDUAL = "residual around a bottleneck's attention"
# What the paper's ablations vary, of a ResNet-50 with the convolutional stem; its "groups" 1 to 4
# are res2 to res5. Their published figures were not at hand: only Table 1's rows have them.
ABLATIONS = {
    "stages that attend": tuple(
        AblationRow(", ".join(stages) or "none", attention_stages=stages)
        for stages in [*(STAGES[i:] for i in range(5)), *(STAGES[:i] for i in range(1, 4))]
    ),
    RESIDUAL: (
        AblationRow("ours: with"),
        AblationRow("the paper's: without", residual=False),
    ),
    "window": tuple(AblationRow(f"{k} x {k}", kernel_size=k) for k in (3, 5, 7, 9, 11)),
    "position": tuple(AblationRow(p, position=p) for p in ("relative", "absolute", "none")),
    "stem": (
        AblationRow("convolution"),
        AblationRow("attention, spatially mixed values", stem="attention"),
        AblationRow("attention, plain values", stem="attention", stem_mixed_values=False),
    ),
}
