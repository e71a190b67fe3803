"""What can be known about a dataset before a run starts."""

import os
from collections.abc import Iterable
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog


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
