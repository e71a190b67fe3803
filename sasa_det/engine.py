"""Training and evaluation: detectron2's trainer with our data, step, optimiser and evaluator."""

import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from sasa_det.checkpoint import WholeCheckpointer, check_optimizer
from sasa_det.config import check_training_config
from sasa_det.data import (
    TrainLoader,
    build_test_mapper,
    build_train_mapper,
    garbage_collection_off,
)
from sasa_det.data.workers import TrainingDataLoader
from sasa_det.distributed import broadcast_buffers
from sasa_det.divergence import DivergedError
from sasa_det.evaluation import RESULTS_FILE, build_evaluator, write_results, write_results_of
from sasa_det.layers import LocalSelfAttention2d, attention_layers, record_attention
from sasa_det.modeling.norm import sync_batch_norm_on_cpu
from sasa_det.optimizer import optimizer_params
from sasa_det.termination import SaveOnTermination
from sasa_det.train_step import StepTrainer


class Trainer(DefaultTrainer):
    """detectron2's DefaultTrainer that evaluates by COCO's metrics and writes them as JSON."""

    iter: int

    def __init__(self, cfg: CfgNode) -> None:
        # What DefaultTrainer's does, but with our step, and for processes on CPUs as well.
        check_training_config(cfg)
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self.cfg = cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        is_on_gpu = next(model.parameters()).is_cuda
        model = create_ddp_model(
            model,
            device_ids=[comm.get_local_rank()] if is_on_gpu else None,
            broadcast_buffers=False,
        )
        amp = cfg.SOLVER.AMP
        self._trainer = StepTrainer(
            model,
            data_loader,
            optimizer,
            num_parts=cfg.SOLVER.ACCUMULATION_STEPS,
            precision=getattr(torch, amp.PRECISION) if amp.ENABLED else torch.float32,
            max_skipped=cfg.SOLVER.MAX_SKIPPED_BATCHES,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.MODEL.DEVICE == "cpu" and comm.get_world_size() > 1:
            sync_batch_norm_on_cpu(model)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        with garbage_collection_off():  # the annotations of COCO load in half the time
            return TrainLoader(cfg, build_train_mapper(cfg))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        loader = build_detection_test_loader(cfg, dataset_name, mapper=build_test_mapper(cfg))
        return TrainingDataLoader.like(loader)

    def resume_or_load(self, resume: bool = True) -> None:
        super().resume_or_load(resume)
        self.data_loader.start = self.start_iter

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
        return {
            **super().state_dict(),
            "_trainer": self._trainer.state_dict(),
            "data_seed": self.data_loader.seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises CheckpointError for the state of another SOLVER.OPTIMIZER, or of none."""
        check_optimizer(state_dict, self.cfg)
        super().load_state_dict(state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        self.data_loader.seed = state_dict.get("data_seed", self.data_loader.seed)

    def build_hooks(self) -> list[HookBase]:
        hooks = super().build_hooks()
        # After the checkpoints; who is told to end does not wait for the evaluation.
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        ours = [AttentionEntropy(), SaveOnTermination(self.checkpointer)]
        return [*hooks[:place], *ours, *hooks[place:]]

    def run_step(self) -> None:
        """Raises DivergedError after saving what it takes to repeat the step."""
        step = self.iter
        try:
            super().run_step()
        except DivergedError as error:
            self.iter = step - 1  # all is as this one left it
            name = f"model_before_{step:07d}"
            self.checkpointer.save(name, iteration=self.iter, diverged=error.facts)
            raise DivergedError(
                f"{error}; {name}.pth has all from before it: --resume repeats the step, and with "
                "SOLVER.MAX_SKIPPED_BATCHES goes on without it.",
                error.facts,
            ) from error

    def train(self) -> Any:
        with remedy_for_out_of_memory():
            return super().train()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None, checkpoint: str | None = None
    ) -> OrderedDict:
        """Evaluates on ``cfg.DATASETS.TEST`` and writes the figures to ``OUTPUT_DIR``.

        ``checkpoint`` is the file that the model is of, None for the one that trains.
        """
        broadcast_buffers(model)  # the checkpoint has the first process's
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            names, folder = cfg.DATASETS.TEST, Path(cfg.OUTPUT_DIR)
            by_dataset = {names[0]: results} if len(names) == 1 else results
            if checkpoint is None:
                write_results(by_dataset, folder / RESULTS_FILE)
            else:
                write_results_of(checkpoint, by_dataset, folder)
        return results


class AttentionEntropy(HookBase):
    """Logs how spread the attention is: the entropy of its weights, of the first image, in nats.

    Eq. 3 has no scale; where its logits grow, softmax freezes on one position and the entropy goes
    to zero. Logged as ``attention_entropy/mean`` and ``/least`` over the layers; one that serves
    several FPN levels is looked at on the finest.
    """

    def __init__(self, period: int = 20) -> None:
        self.period = period
        self._recording = ExitStack()
        self._entropies: dict[str, list[float]] = {}

    def before_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0:
            model = self.trainer.model
            layers = attention_layers(model).items()
            # Not the stem: its blocks are small, and its maps as large as the images.
            names = [name for name, x in layers if isinstance(x, LocalSelfAttention2d)]
            recording = record_attention(model, names, keep=mean_entropy, num_images=1)
            self._entropies = self._recording.enter_context(recording)

    def after_step(self) -> None:
        self._recording.close()
        values = [by_call[0] for by_call in self._entropies.values() if by_call]
        if values:
            self.trainer.storage.put_scalars(
                **{
                    "attention_entropy/mean": sum(values) / len(values),
                    "attention_entropy/least": min(values),
                }
            )
        self._entropies = {}


def mean_entropy(layer: nn.Module, weights: torch.Tensor) -> float:
    """Of attention weights (N, num_heads, k * k, H, W), in nats."""
    return float(torch.special.entr(weights).sum(dim=2).mean())


@contextmanager
def remedy_for_out_of_memory() -> Iterator[None]:
    """Puts the keys that save memory in front of the message of torch's out-of-memory errors."""
    try:
        yield
    except RuntimeError as error:  # of CUDA, and of the CPU's allocator
        if not isinstance(error, torch.OutOfMemoryError) and "t allocate memory" not in str(error):
            raise
        raise type(error)(
            "Out of memory: set MODEL.SASA.ACTIVATION_CHECKPOINTING to True, or lower "
            f"SOLVER.IMS_PER_BATCH or the size of the images. ({error})"
        ) from error
