"""What ``test_distributed.py`` has both one process and two do; run by torchrun, it writes it down.

torchrun --nproc-per-node 2 tests/ranks.py FOLDER
"""

import argparse
import os
import sys
from itertools import islice
from pathlib import Path

import torch

import sasa_det  # noqa: F401

# isort: split
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from sasa_det.config import load_config
from sasa_det.data import TrainLoader, build_train_mapper
from sasa_det.distributed import launch
from sasa_det.engine import Trainer

DEMO = str(Path(__file__).parent.parent / "configs" / "demo.yaml")
# The demo's model on few, small pictures; plain SGD, as AdamW makes much of a gradient's last bits.
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.WARMUP_ITERS", "1"]
SMALL += ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.01", "SOLVER.IMS_PER_BATCH", "4"]
SMALL += ["DATASETS.TRAIN", "('sasa_digits_val',)", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "4"]
LOSSES = ("loss_cls", "loss_box_reg")
SYNCHRONISED = ["MODEL.RESNETS.NORM", "SyncBN"]
IN_PARTS = ["MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
IN_PARTS += ["MODEL.RESNETS.WIDTH_PER_GROUP", "32"]
SPOILED = [*SYNCHRONISED, "SOLVER.MAX_SKIPPED_BATCHES", "3"]
# Its proposals are what is not finite; detectron2 raises an error then, in that rank alone.
PROPOSING = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.ROI_HEADS.NAME"]
PROPOSING += ["StandardROIHeads", "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"]
PROPOSING += ["MODEL.ROI_BOX_HEAD.NUM_FC", "1", "MODEL.RPN.IN_FEATURES", "('p3', 'p4', 'p5')"]
PROPOSING += ["MODEL.ROI_HEADS.IN_FEATURES", "('p3', 'p4')", "SOLVER.MAX_SKIPPED_BATCHES", "3"]
# Everything that a loader draws: order, size, flip; wide and high pictures apart.
DRAWN = ["DATASETS.TRAIN", "('ranks_pictures',)", "INPUT.RANDOM_FLIP", "horizontal"]
DRAWN += ["INPUT.MIN_SIZE_TRAIN", "(32, 48, 64)", "SOLVER.IMS_PER_BATCH", "4", "SEED", "3"]


class DoubleTrainer(Trainer):
    """In float64, where what should be equal is equal to ten digits, through all steps."""

    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).double()


class SpoiledTrainer(Trainer):
    """The second image of the second batch, which the second of two ranks gets, is not finite."""

    @classmethod
    def build_train_loader(cls, cfg):
        mapper = build_train_mapper(cfg)

        def spoil(record):
            mapped = mapper(record)
            if record["file_name"] == bad:
                mapped["image"] = mapped["image"] * float("nan")
            return mapped

        loader = TrainLoader(cfg, spoil)
        index, _ = next(islice(loader.batches(), 1, 2))[1]
        bad = loader.mapped._dataset[index]["file_name"]
        return loader


class SpoiledDoubleTrainer(SpoiledTrainer, DoubleTrainer):
    pass


def make_trainer(kind: type[Trainer], folder: Path, *overrides: str) -> Trainer:
    cfg = load_config(DEMO, [*SMALL, *overrides, "OUTPUT_DIR", str(folder)])
    seed_all_rng(cfg.SEED + comm.get_rank())
    folder.mkdir(exist_ok=True)
    return kind(cfg)


def train(folder: Path, *overrides: str, kind: type[Trainer] = DoubleTrainer) -> dict:
    """The losses of each step, weights and statistics after the last, and the trainer."""
    trainer = make_trainer(kind, folder, *overrides)
    losses = []
    with EventStorage() as storage:
        trainer.storage = trainer._trainer.storage = storage
        for _ in range(trainer.max_iter):
            trainer.run_step()
            trainer.scheduler.step()
            latest = storage.latest()  # of all ranks, in the first one
            losses.append({name: latest[name][0] for name in LOSSES if name in latest})
    return {
        "losses": losses,
        "weights": trainer.checkpointer.model.state_dict(),
        "trainer": trainer,
    }


def evaluate(trainer: Trainer) -> dict:
    """With every detection kept, however bad: an AP of zero would say little."""
    detector = getattr(trainer.model, "module", trainer.model).float()  # as torchvision's NMS needs
    detector.test_score_thresh = 0.0
    return dict(Trainer.test(trainer.cfg, trainer.model))


def batches(num_workers: int = 0, start: int = 0) -> list[list[tuple]]:
    """The next five batches of a loader: of each picture its file, size and sum."""
    cfg = load_config(DEMO, [*DRAWN, "DATALOADER.NUM_WORKERS", str(num_workers)])
    seed_all_rng(cfg.SEED + comm.get_rank())
    loader = TrainLoader(cfg, build_train_mapper(cfg))
    loader.start = start
    described = []
    for batch, _ in zip(loader, range(5)):
        described.append([describe(picture) for picture in batch])
    return described


def describe(picture: dict) -> tuple:
    image = picture["image"]
    # Weighted by the column: a flip is to be seen.
    columns = torch.arange(image.shape[2], dtype=torch.float64)
    return Path(picture["file_name"]).name, *image.shape, float((image * columns).sum())


def main(args: argparse.Namespace) -> None:
    folder = args.folder
    register_pictures(folder)
    synchronised = train(folder / "synchronised", *SYNCHRONISED)
    results = {
        "world size": comm.get_world_size(),
        "local": (comm.get_local_rank(), comm.get_local_size()),
        "synchronised": synchronised,
        "AP": evaluate(synchronised.pop("trainer")),
        "in parts": train(folder / "parts", *IN_PARTS, "SOLVER.ACCUMULATION_STEPS", "2"),
        "batches": comm.gather(batches()),
    }
    spoiled = train(folder / "spoiled", *SPOILED, kind=SpoiledDoubleTrainer)
    results["skipped"] = comm.gather(spoiled.pop("trainer")._trainer.num_skipped)
    results["spoiled"] = spoiled
    proposing = train(folder / "proposing", *PROPOSING, kind=SpoiledTrainer)
    results["proposing"] = comm.gather(
        (proposing["trainer"]._trainer.num_skipped, proposing["weights"])
    )
    results["float32"] = train(folder / "float32", *SYNCHRONISED, kind=Trainer)["weights"]
    del results["in parts"]["trainer"]
    if comm.is_main_process():
        torch.save(results, folder / "results.pt")


def names_of_threads() -> list[str]:
    """Of this process; those of Gloo say so."""
    return [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]


def register_pictures(folder: Path) -> None:
    """Six wide and six high pictures without annotations, written by the test."""
    from detectron2.data import DatasetCatalog
    from PIL import Image

    def load() -> list[dict]:
        records = []
        for number, path in enumerate(sorted((folder / "pictures").glob("*.png"))):
            width, height = Image.open(path).size
            record = {"file_name": str(path), "image_id": number, "width": width, "height": height}
            box = {"bbox": [2, 2, 9, 9], "bbox_mode": 0, "category_id": 0}
            records.append({**record, "annotations": [box]})
        return records

    if "ranks_pictures" in DatasetCatalog.list():
        DatasetCatalog.remove("ranks_pictures")
    DatasetCatalog.register("ranks_pictures", load)


if __name__ == "__main__":
    arguments = argparse.Namespace(num_gpus=1, folder=Path(sys.argv[1]))
    launch(main, arguments, device="cpu")
    threads = arguments.folder / f"threads_{os.environ['RANK']}.txt"
    threads.write_text("\n".join(names_of_threads()))
