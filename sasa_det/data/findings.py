"""What is wrong with a dataset, and what detectron2 makes of it."""

from dataclasses import dataclass
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

ERROR, WARNING, NOTE = "error", "warning", "note"
SEVERITIES = (ERROR, WARNING, NOTE)
_NUM_CLASSES_KEYS = {
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "SASARetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
}


class Effect(NamedTuple):
    """How bad a fault is in one use of a dataset, and what happens there: "drops the box"."""

    severity: str
    text: str


STOPS = Effect(ERROR, "stops when it comes to it")
NEVER_FOUND = "counts the object as never found"


class Kind(NamedTuple):
    """A fault; ``None`` where it does no harm."""

    name: str
    training: Effect | None
    evaluation: Effect | None


class Finding(NamedTuple):
    """One fault of one record: ``str`` of it is the sentence, without a stop.

    Attributes:
        file (str): path of the annotation file, or of the image where that is at fault.
        record (str): the image, annotation or category by its id.
        message (str): what is wrong, continuing "FILE: RECORD".
    """

    kind: Kind
    file: str
    record: str
    message: str

    def __str__(self) -> str:
        return f"{printable(self.file)}: {self.record} {self.message}"


def printable(text: str) -> str:
    """A name from an annotation file does not get to steer the terminal."""
    return text if text.isprintable() else repr(text)


def registered_classes(dataset: str) -> tuple[str, ...]:
    return tuple(MetadataCatalog.get(dataset).get("thing_classes", ()))


@dataclass(frozen=True)
class Use:
    """What a dataset is to serve.

    Attributes:
        training (bool): training, or evaluation.
        num_classes (int or None): of the model, under the key ``num_classes_key``.
        mask_format (str or None): INPUT.MASK_FORMAT of a model that needs masks to train.
        image_format (str): INPUT.FORMAT.
        registered_classes (tuple[str, ...]): the names, in the order of their ids, where the
            dataset is registered with some.
    """

    training: bool = True
    num_classes: int | None = None
    num_classes_key: str = ""
    mask_format: str | None = None
    image_format: str = "BGR"
    registered_classes: tuple[str, ...] = ()

    @classmethod
    def of_config(cls, cfg: CfgNode, training: bool, dataset: str = "") -> "Use":
        """``dataset`` is the name under which it is registered, if it is."""
        key = _NUM_CLASSES_KEYS.get(cfg.MODEL.META_ARCHITECTURE, "")
        return cls(
            training=training,
            num_classes=cfg.MODEL[key.split(".")[1]].NUM_CLASSES if key else None,
            num_classes_key=key,
            mask_format=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON and training else None,
            image_format=cfg.INPUT.FORMAT,
            registered_classes=registered_classes(dataset) if dataset else (),
        )

    def effect(self, kind: Kind) -> Effect | None:
        return kind.training if self.training else kind.evaluation
