"""Evaluation: detectron2's evaluators on any installation of it, and their figures as JSON."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from detectron2.evaluation import COCOEvaluator
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det.compat import has_compiled_operators

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS_FILE = "evaluation.json"


class BoxEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, official or compiled as the installation allows.

    A model that detects nothing has an AP of zero; detectron2 would report NaN.
    """

    def __init__(self, dataset_name: str, output_dir: str) -> None:
        super().__init__(
            dataset_name, output_dir=output_dir, use_fast_impl=has_compiled_operators()
        )

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._evaluate_nothing(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> COCOeval:
        logging.getLogger(__name__).warning("The model detected nothing above its score threshold.")
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        coco_eval = COCOeval(self._coco_api, nothing, iou_type)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval


def write_results(results: dict[str, dict], path: Path) -> None:
    """Writes {dataset: {"bbox": {"AP": ..., ...}}} as JSON; what COCO cannot compute is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(clean(results), indent=2) + "\n")
    logging.getLogger(__name__).info("Results written to %s", path)
