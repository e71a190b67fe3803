#!/usr/bin/env python
"""Trains a backbone as an image classifier; the checkpoint starts a detector.

    python tools/train_classifier.py --data datasets/imagenet --num-gpus 8
    python tools/train_classifier.py --data datasets/imagenet --num-gpus 8 --resume
    python tools/train_net.py --config configs/retinanet_full_attn.yaml \
        MODEL.WEIGHTS output/classifier/model_final.pth

The three models of the paper's Table 1, each with --depth 26, 38 or 50: full attention is the
default; --stem conv is its convolutional stem with attention; and --stem conv --attention-stages,
with no stage named, is the convolutional baseline. Epochs, batch, learning rate and average are by
default the paper's on ImageNet.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

import sasa_det  # noqa: F401  (before detectron2, see compat.py)

# isort: split
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from sasa_det.checkpoint import CheckpointError
from sasa_det.classification import ClassifierRecipe, ClassifierTrainer, check_resume
from sasa_det.config import STAGES, STEMS
from sasa_det.data.classification import FORMATS, load_images
from sasa_det.data.workers import UnusableImageError
from sasa_det.distributed import check_launch, launch, num_processes


def main(args: argparse.Namespace) -> None:
    """In each process; what the user can do something about ends in one sentence."""
    try:
        run(args)
    except (CheckpointError, UnusableImageError) as error:
        sys.exit(f"error: {error}")
    except FloatingPointError as error:  # detectron2's, of several lines
        sys.exit(f"error: {' '.join(str(error).split())}; start anew with a lower --lr.")


def run(args: argparse.Namespace) -> None:
    if comm.is_main_process():
        Path(args.output).mkdir(parents=True, exist_ok=True)
    comm.synchronize()
    for name in ("fvcore", "detectron2", "sasa_det"):
        setup_logger(args.output, comm.get_rank(), name=name)
    logger = logging.getLogger("sasa_det")
    if not args.cuda:
        logger.warning("No GPU is used: running on the CPU.")
    logger.info("%s", args.recipe)
    seed_all_rng(args.recipe.seed)
    trainer = ClassifierTrainer(
        args.recipe,
        args.data,
        args.output,
        device="cuda" if args.cuda else "cpu",
        num_workers=args.workers,
        mixed_precision=args.precision == "bfloat16",
    )
    trainer.run(resume=args.resume)


def setup(args: argparse.Namespace) -> None:
    """Adds the recipe to ``args``: what can be known to be wrong is said here.

    Raises:
        FileNotFoundError, ValueError: with one sentence for the user.
    """
    options = {field.name: getattr(args, field.name) for field in fields(ClassifierRecipe)}
    options["attention_stages"] = tuple(args.attention_stages)
    args.recipe = ClassifierRecipe(**options)
    args.cuda = torch.cuda.is_available()
    args.precision = args.precision or ("bfloat16" if args.cuda else "float32")
    check_launch(args, "cuda" if args.cuda else "cpu")
    for name, is_possible, allowed in RANGES:
        value = getattr(args, name)
        if value is not None and not is_possible(value):
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be {allowed}, but is {value}.")
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise ValueError(f"--output {args.output!r} is a file; name a folder.")
    processes = num_processes(args)
    if args.batch_size % processes:
        raise ValueError(
            f"--batch-size {args.batch_size} cannot be shared out to {processes} processes; choose "
            "a multiple of them."
        )
    if not 0 <= args.warmup_epochs < args.epochs:
        raise ValueError(
            f"--warmup-epochs is {args.warmup_epochs:g}, which leaves none of the {args.epochs} "
            "epochs to train at the learning rate; give fewer."
        )
    train, _ = load_images(args.data, args.data_format)
    if args.batch_size > len(train):
        raise ValueError(
            f"--batch-size {args.batch_size} is more than the {len(train)} training images; "
            "choose a smaller one."
        )
    with torch.device("meta"):
        args.recipe.build_resnet(len(train.classes))
    if args.resume:
        check_resume(args.output, args.recipe, train.classes)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument(
        "--data-format",
        choices=FORMATS,
        default=ClassifierRecipe.data_format,
        help="folder: train/CLASS/*.jpg and val/CLASS/*.jpg; cifar10: downloaded if not there",
    )
    parser.add_argument("--output", default="output/classifier", help="folder for what is made")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint, if any")
    parser.add_argument("--stem", choices=STEMS, default=ClassifierRecipe.stem)
    parser.add_argument(
        "--attention-stages",
        nargs="*",
        choices=STAGES,
        default=ClassifierRecipe.attention_stages,
        help="the others are convolutional",
    )
    for name, kind, text in RECIPE_OPTIONS:
        default = getattr(ClassifierRecipe, name)
        shown = text if default is None else f"{text}; default {default}"
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=kind, default=default, metavar="N", help=shown)
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="of the network's products; default bfloat16 on GPUs, float32 on the CPU",
    )
    parser.add_argument("--workers", type=int, default=4, help="loading images, per GPU; default 4")
    parser.add_argument("--num-gpus", type=positive, default=1, help="per machine")
    parser.add_argument("--num-machines", type=positive, default=1)
    parser.add_argument("--machine-rank", type=int, default=0)
    parser.add_argument("--dist-url", default="auto", help="of the first of several machines")
    args = parser.parse_args()
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://HOST:PORT of the first machine")
    return args


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, but is {number}")
    return number


RECIPE_OPTIONS = (
    ("depth", int, "26, 38, 50, 101 or 152"),
    ("width", positive, "channels of the stem and of the bottlenecks of res2"),
    ("kernel_size", positive, "side of the attention window"),
    ("num_heads", positive, "of every attention layer"),
    ("image_size", positive, "side of the images that are trained and validated with"),
    ("min_crop", float, "the smallest random cut, as part of an image's area"),
    ("epochs", positive, "how often each image is seen"),
    ("warmup_epochs", float, "in which the learning rate rises; then it falls as a cosine"),
    ("batch_size", positive, "of all GPUs together"),
    ("lr", float, "default 1.6 at a batch of 4096, scaled linearly"),
    ("momentum", float, "Nesterov's"),
    ("weight_decay", float, "of weights, not of norms and position embeddings"),
    ("label_smoothing", float, "of the cross-entropy"),
    ("ema_decay", float, "of the average that is evaluated and saved"),
    ("seed", int, "of weights, order and augmentation"),
)
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("seed", lambda x: 0 <= x < 2**32, "from 0 to 4294967295"),
    ("workers", lambda x: x >= 0, "0 or more"),
    ("min_crop", lambda x: 0 < x <= 1, "above 0 and not above 1"),
    ("lr", lambda x: 0 < x < math.inf, "a number above 0"),
    ("momentum", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("weight_decay", lambda x: 0 <= x < math.inf, "a number from 0"),
    ("label_smoothing", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("ema_decay", lambda x: 0 <= x <= 1, "from 0 to 1"),
)


if __name__ == "__main__":
    arguments = parse_args()
    try:
        # Before processes are started: one sentence instead of a stack of frames from each.
        setup(arguments)
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")
    launch(main, arguments, device="cuda" if arguments.cuda else "cpu")
