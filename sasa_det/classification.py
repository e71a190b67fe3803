"""Training of a backbone as a classifier: the first half of arXiv 1906.05909.

The pixels are a detector's, and each checkpoint is one that detectron2 loads into a detector whose
config has the same backbone: ``MODEL.WEIGHTS``.
"""

import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.engine import HookBase, SimpleTrainer, create_ddp_model, default_writers, hooks
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset
from detectron2.modeling import ResNet
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
)
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sasa_det.checkpoint import WholeCheckpointer
from sasa_det.config import STAGES
from sasa_det.data import classification as data
from sasa_det.distributed import broadcast_buffers
from sasa_det.engine import AttentionEntropy
from sasa_det.evaluation import RESULTS_FILE, write_results
from sasa_det.modeling import make_sasa_resnet
from sasa_det.optimizer import optimizer_params
from sasa_det.termination import SaveOnTermination
from sasa_det.weight_files import read_weights

# The configs' MODEL.PIXEL_MEAN and MODEL.PIXEL_STD, blue first.
PIXEL_MEAN = (103.53, 116.28, 123.675)
PIXEL_STD = (57.375, 57.12, 58.395)


@dataclass(frozen=True)
class ClassifierRecipe:
    """What a training depends on, besides the images.

    Model, epochs, warm-up, batch, learning rate and average are by default the paper's on ImageNet;
    what else there is, as is usual for ResNets.
    """

    depth: int = 50
    stem: str = "attention"
    attention_stages: tuple[str, ...] = STAGES
    kernel_size: int = 7
    num_heads: int = 8
    # Channels of the stem and of the bottlenecks of res2: MODEL.RESNETS.STEM_OUT_CHANNELS and
    # WIDTH_PER_GROUP; RES2_OUT_CHANNELS is four times that.
    width: int = 64
    data_format: str = "folder"
    image_size: int = 224
    # The smallest random cut, as part of the image's area.
    min_crop: float = 0.08
    epochs: int = 130
    warmup_epochs: float = 10
    # Of all processes together.
    batch_size: int = 4096
    # None: 1.6 at a batch of 4096, scaled linearly.
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    ema_decay: float = 0.9999
    seed: int = 0

    def base_lr(self) -> float:
        return 1.6 * self.batch_size / 4096 if self.lr is None else self.lr

    def build_resnet(self, num_classes: int) -> ResNet:
        """Raises ValueError for what cannot be built."""
        return make_sasa_resnet(
            depth=self.depth,
            stem=self.stem,
            attention_stages=self.attention_stages,
            kernel_size=self.kernel_size,
            num_heads=self.num_heads,
            stem_channels=self.width,
            bottleneck_channels=self.width,
            res2_channels=4 * self.width,
            num_classes=num_classes,
        )


class Classifier(nn.Module):
    """A ResNet with its loss, fed as a detector is: images from disk, normalised here.

    Args:
        backbone (ResNet): with ``num_classes``.
        label_smoothing (float): of the cross-entropy.
        mixed_precision (bool): bfloat16 where autocast says so.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, backbone: ResNet, label_smoothing: float = 0.0, mixed_precision: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.label_smoothing = label_smoothing
        self.mixed_precision = mixed_precision
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Any:
        """The loss in training, logits (N, num_classes) in evaluation.

        Args:
            batch: uint8 RGB images (N, 3, H, W) and labels (N,), on any device.
        """
        images, labels = (x.to(self.pixel_mean.device, non_blocking=True) for x in batch)
        pixels = (images.flip(1) - self.pixel_mean) / self.pixel_std
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.mixed_precision):
            logits = self.backbone(pixels)["linear"].float()
        if not self.training:
            return logits
        return {"loss_cls": F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)}


class Accuracy(DatasetEvaluator):
    """Top-1 and top-5 in percent, of the images of all processes."""

    def reset(self) -> None:
        self._hits = torch.zeros(2, dtype=torch.long)
        self._count = 0

    def process(self, inputs: tuple[Tensor, Tensor], outputs: Tensor) -> None:
        labels = inputs[1].to(outputs.device)
        best = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]
        self._hits += torch.stack([best[:, 0].sum(), best.sum()]).cpu()
        self._count += len(labels)

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        parts = comm.gather((self._hits, self._count))
        if not comm.is_main_process():
            return None
        hits, count = (sum(part) for part in zip(*parts))
        top1, top5 = (100 * int(hit) / count for hit in hits)
        return {"classification": {"top1": top1, "top5": top5}}


class WeightAverage(HookBase):
    """Keeps the average of weights and of batch norm's statistics up to date, after each step."""

    def after_step(self) -> None:
        self.trainer.average.update_parameters(self.trainer.classifier)


def average_weights(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of a model's parameters and buffers.

    Early on, the decay is (1 + steps) / (10 + steps): the average does not remember the start.
    """

    def update(averaged: Any, current: Any, steps: Tensor | int) -> None:
        number = int(steps)
        now = min(decay, (1 + number) / (10 + number))
        get_ema_multi_avg_fn(now)(averaged, current, steps)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)


class ClassifierCheckpointer(WholeCheckpointer):
    """Saves with what detectron2 needs to find ``res2...`` again as ``backbone.bottom_up.res2...``.

    Args:
        description (dict): of the run, saved as ``classifier``.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, description: dict[str, Any], **checkpointables: Any
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.description = description

    def save(self, name: str, **kwargs: Any) -> None:
        super().save(name, matching_heuristics=True, classifier=self.description, **kwargs)


class ClassifierTrainer(SimpleTrainer):
    """detectron2's trainer with the recipe's schedule, average, data, checkpoints and evaluation.

    Writes to ``output_dir``, after each epoch: a checkpoint whose ``model`` is the average, and the
    accuracy of the average as JSON.

    Args:
        recipe (ClassifierRecipe): see there.
        root (str): folder of the images.
        output_dir (str): exists.
        device (str): "cpu" or "cuda".
        num_workers (int): processes that load images, for each process that trains.
        mixed_precision (bool): bfloat16 autocast.
    """

    def __init__(
        self,
        recipe: ClassifierRecipe,
        root: str,
        output_dir: str,
        *,
        device: str = "cpu",
        num_workers: int = 4,
        mixed_precision: bool = False,
    ) -> None:
        self.recipe = recipe
        self.output_dir = output_dir
        self.num_workers = num_workers
        self.images = data.load_images(root, recipe.data_format)
        name = recipe.data_format if recipe.data_format != "folder" else Path(root).resolve().name
        self.dataset_name = f"{name}_val"
        classes = self.images[0].classes
        resnet = recipe.build_resnet(len(classes)).to(memory_format=torch.channels_last)
        self.classifier = Classifier(resnet, recipe.label_smoothing, mixed_precision).to(device)
        self.average = average_weights(self.classifier, recipe.ema_decay)
        optimizer = torch.optim.SGD(
            optimizer_params(self.classifier, weight_decay_norm=0.0),
            lr=recipe.base_lr(),
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )
        # Batch norm's statistics are the first process's in all of them.
        device_ids = [torch.cuda.current_device()] if device == "cuda" else None
        model = create_ddp_model(self.classifier, device_ids=device_ids)
        super().__init__(model, self._batches(), optimizer)
        self.steps_per_epoch = len(self.images[0]) // recipe.batch_size
        self.max_iter = recipe.epochs * self.steps_per_epoch
        self.checkpointer = ClassifierCheckpointer(
            self.average.get_submodule("module.backbone"),
            output_dir,
            {**asdict(recipe), "classes": list(classes)},
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        recipe = self.recipe
        warmup = recipe.warmup_epochs / recipe.epochs
        first = 1 / max(recipe.warmup_epochs * self.steps_per_epoch, 1)
        parts = [LinearParamScheduler(first, 1), CosineParamScheduler(1, 0)]
        lengths, scaling = [warmup, 1 - warmup], ["rescaled", "rescaled"]
        schedule = CompositeParamScheduler(parts, lengths, scaling) if warmup else parts[1]
        scheduler = LRMultiplier(self.optimizer, schedule, self.max_iter)
        built = [
            hooks.IterationTimer(),
            WeightAverage(),
            hooks.LRScheduler(self.optimizer, scheduler),
            AttentionEntropy(),
        ]
        if comm.is_main_process():
            period = self.steps_per_epoch
            built.append(hooks.PeriodicCheckpointer(self.checkpointer, period, max_to_keep=2))
        built.append(SaveOnTermination(self.checkpointer))
        built.append(hooks.EvalHook(self.steps_per_epoch, self.test))
        if comm.is_main_process():
            built.append(hooks.PeriodicWriter(default_writers(self.output_dir, self.max_iter)))
        return built

    def run(self, *, resume: bool = False) -> None:
        """Trains to the end; with ``resume`` from the last checkpoint of the output folder, if any.

        An interrupted and resumed training equals an uninterrupted one. The number of processes may
        change in between; their batch norms see other batches then.
        """
        start = 0
        if resume and self.checkpointer.has_checkpoint():
            self.checkpointer.resume_or_load("", resume=True)
            start = self.iter + 1
        self.train(start, self.max_iter)

    def test(self) -> dict[str, dict[str, float]]:
        """Evaluates the average on the validation images, and writes the figures."""
        recipe = self.recipe
        broadcast_buffers(self.average.module)
        transform = data.val_transform(recipe.data_format, recipe.image_size)
        images = data.TransformedImages(self.images[1], transform)
        loader = data.val_loader(images, self._batch_of_a_process(), self.num_workers)
        results = inference_on_dataset(self.average.module, loader, Accuracy())
        if comm.is_main_process():
            # After the last step detectron2 counts one more.
            steps = min(self.iter + 1, self.max_iter)
            model = {
                **asdict(recipe),
                "lr": recipe.base_lr(),
                "num_classes": len(self.images[0].classes),
                "epochs_trained": steps // self.steps_per_epoch,
            }
            by_dataset = {self.dataset_name: {**results, "model": model}}
            write_results(by_dataset, Path(self.output_dir) / RESULTS_FILE)
        return results

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides the average."""
        return {
            **super().state_dict(),
            "weights": self.classifier.backbone.state_dict(),
            "num_averaged": int(self.average.n_averaged),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.classifier.backbone.load_state_dict(state_dict["weights"])
        self.average.n_averaged.fill_(state_dict["num_averaged"])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A generator: it begins with the first step, when it is known which one that is.
        recipe = self.recipe
        transform = data.train_transform(recipe.data_format, recipe.image_size, recipe.min_crop)
        images = data.TransformedImages(self.images[0], transform)
        batches = data.TrainingBatches(
            len(images), recipe.batch_size, self.start_iter, self.max_iter, recipe.seed
        )
        yield from data.train_loader(images, batches, self.num_workers)

    def _batch_of_a_process(self) -> int:
        return -(-self.recipe.batch_size // comm.get_world_size())


def check_resume(output_dir: str, recipe: ClassifierRecipe, classes: list[str]) -> None:
    """Checks that the last checkpoint of a folder, if there is one, is of this run.

    Raises:
        ValueError: for one of other options or other classes; up to three of them are named.
    """
    checkpointer = WholeCheckpointer(nn.Module(), output_dir)
    if not checkpointer.has_checkpoint():
        return
    path = checkpointer.last_whole_checkpoint()
    checkpoint = read_weights(path)
    if "classifier" not in checkpoint:
        raise ValueError(f"The checkpoint {path} is not a classifier's; choose another --output.")
    there, here = checkpoint["classifier"], {**asdict(recipe), "classes": classes}
    different = [name for name in here if there.get(name) != here[name]]
    if different:
        named = [f"{name} is {there.get(name)}, not {here[name]}" for name in different[:3]]
        raise ValueError(
            f"The checkpoint {path} is of another run: {', '.join(named)}; resume with the options "
            "it was started with, or choose another --output."
        )
