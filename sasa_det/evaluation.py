"""Evaluation: detectron2's evaluators for what a config detects, and their figures as JSON."""

import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sasa_det.whole_files import write_text

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS_FILE = "evaluation.json"
_logger = logging.getLogger("detectron2.evaluation.sasa_det")  # in detectron2's log.txt too


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluators for a dataset: boxes, masks and keypoints; stuff and panoptic segmentation.

    Which ones is read from the dataset's ``evaluator_type`` as detectron2 registers it; all that is
    neither "sem_seg" nor "coco_panoptic_seg" is evaluated by COCO's metrics. What they write goes
    to ``OUTPUT_DIR/inference``. Panoptic quality needs the package panopticapi; without it the
    other figures are computed, and a warning says so.
    """
    output_dir = str(Path(cfg.OUTPUT_DIR) / "inference")
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    evaluators: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(dataset_name, output_dir=output_dir))
    if kind != "sem_seg":
        tasks = ["bbox", *["segm"] * cfg.MODEL.MASK_ON, *["keypoints"] * cfg.MODEL.KEYPOINT_ON]
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        evaluators.append(InstanceEvaluator(dataset_name, output_dir, tasks, sigmas))
    if kind == "coco_panoptic_seg":
        if importlib.util.find_spec("panopticapi"):
            evaluators.append(COCOPanopticEvaluator(dataset_name, output_dir))
        else:
            _logger.warning(
                "The panoptic quality is left out, because panopticapi is not installed: "
                "pip install git+https://github.com/cocodataset/panopticapi.git"
            )
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


class InstanceEvaluator(COCOEvaluator):
    """detectron2's COCOEvaluator, for which a model that detects nothing has an AP of zero.

    detectron2 would report NaN, and for boxes only.

    Args:
        dataset_name (str): as it is registered.
        output_dir (str or None): for the predictions.
        tasks (list[str]): what the model predicts, out of bbox, segm and keypoints.
        kpt_oks_sigmas (list[float]): see ``TEST.KEYPOINT_OKS_SIGMAS``; COCO's where it is empty.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        tasks: Sequence[str] = ("bbox",),
        kpt_oks_sigmas: Sequence[float] = (),
    ) -> None:
        super().__init__(dataset_name, output_dir=output_dir, kpt_oks_sigmas=kpt_oks_sigmas)
        self._tasks_of_model = sorted(tasks)

    def _tasks_from_predictions(self, predictions: list[dict]) -> list[str]:
        return super()._tasks_from_predictions(predictions) if predictions else self._tasks_of_model

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            coco_eval = self._evaluate_nothing(iou_type)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)

    def _evaluate_nothing(self, iou_type: str) -> COCOeval:
        _logger.warning("The model detected nothing above its score threshold.")
        nothing = COCO()
        nothing.dataset = {**self._coco_api.dataset, "annotations": []}
        nothing.createIndex()
        coco_eval = COCOeval(self._coco_api, nothing, iou_type)
        coco_eval.evaluate()
        coco_eval.accumulate()
        coco_eval.summarize()
        return coco_eval


def write_results(results: dict[str, dict], path: Path) -> None:
    """Writes {dataset: {"bbox": {"AP": ..., ...}}} as JSON; what cannot be computed is null.

    Beside "bbox" stand "segm", "keypoints", "sem_seg" and "panoptic_seg" where they are evaluated.
    """

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(json.dumps(clean(results), indent=2) + "\n", path)
    _logger.info("Results written to %s", path)


def write_results_of(checkpoint: str, results: dict[str, dict], folder: Path) -> None:
    """The same for an evaluation alone, which leaves what a training in ``folder`` found.

    There evaluation.json is of ``model_final.pth``, and keeps the figures of other datasets; those
    of another checkpoint go to ``evaluation_NAME.json``.
    """
    path = folder / RESULTS_FILE
    if (folder / "last_checkpoint").is_file():  # as each training has it
        if Path(checkpoint).resolve() != (folder / "model_final.pth").resolve():
            path = folder / f"evaluation_{Path(checkpoint).stem}.json"
        if path.is_file():
            results = {**json.loads(path.read_text()), **results}
    write_results(results, path)
