"""Training and evaluation: detectron2's trainer with our data, optimiser and evaluator."""

import json
import logging
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import COCOEvaluator
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.hooks import RemovableHandle

from sasa_det.compat import has_compiled_operators
from sasa_det.data import build_test_mapper, build_train_mapper, garbage_collection_off
from sasa_det.layers import LocalSelfAttention2d
from sasa_det.optimizer import optimizer_params
from sasa_det.weight_files import SafeCheckpointer

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
RESULTS_FILE = "evaluation.json"


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer that evaluates by COCO's metrics and writes them as JSON."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        # Hooks save with detectron2's; this one is for loading.
        theirs = vars(self)["checkpointer"]
        self.checkpointer = SafeCheckpointer(
            theirs.model, theirs.save_dir, **theirs.checkpointables
        )

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        with garbage_collection_off():  # the annotations of COCO load in half the time
            return build_detection_train_loader(cfg, mapper=build_train_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        return build_detection_test_loader(cfg, dataset_name, mapper=build_test_mapper(cfg))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """SGD as detectron2 builds it, or AdamW; position embeddings do not decay."""
        solver = cfg.SOLVER
        params = optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        options = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
        if solver.OPTIMIZER == "ADAMW":
            return maybe_add_gradient_clipping(cfg, torch.optim.AdamW)(params, **options)
        return maybe_add_gradient_clipping(cfg, torch.optim.SGD)(
            params, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **options
        )

    def state_dict(self) -> dict[str, Any]:
        """With the optimiser's state, which detectron2 0.5 forgets and later ones save so."""
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])

    def build_hooks(self) -> list[HookBase]:
        # Before the writers, which detectron2 puts last.
        hooks = super().build_hooks()
        return [*hooks[:-1], AttentionEntropy(), *hooks[-1:]]

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        return BoxEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> OrderedDict:
        """Evaluates on ``cfg.DATASETS.TEST`` and writes the figures to ``OUTPUT_DIR``."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            names = cfg.DATASETS.TEST
            by_dataset = {names[0]: results} if len(names) == 1 else results
            write_results(by_dataset, Path(cfg.OUTPUT_DIR) / RESULTS_FILE)
        return results


class AttentionEntropy(HookBase):
    """Logs how spread the attention is: the entropy of its weights, of the first image, in nats.

    Eq. 3 has no scale; where its logits grow, softmax freezes on one position and the entropy goes
    to zero. Logged as ``attention_entropy/mean`` and ``/least`` over the layers; one that serves
    several FPN levels is looked at on the finest.
    """

    def __init__(self, period: int = 20) -> None:
        self.period = period
        self._entropies: dict[nn.Module, float] = {}
        self._handles: list[RemovableHandle] = []

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            for module in self.trainer.model.modules():
                if isinstance(module, LocalSelfAttention2d):
                    self._handles.append(module.register_forward_pre_hook(self._look))

    def after_step(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._entropies:
            values = list(self._entropies.values())
            self.trainer.storage.put_scalars(
                **{
                    "attention_entropy/mean": sum(values) / len(values),
                    "attention_entropy/least": min(values),
                }
            )
        self._handles, self._entropies = [], {}

    @torch.no_grad()
    def _look(self, module: LocalSelfAttention2d, inputs: tuple[torch.Tensor]) -> None:
        if module not in self._entropies:
            weights = module.attention_weights(inputs[0][:1])
            self._entropies[module] = float(torch.special.entr(weights).sum(dim=2).mean())


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
