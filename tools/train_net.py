#!/usr/bin/env python
"""Trains and evaluates a box detector, of this package or of detectron2.

    python tools/train_net.py --config configs/retinanet_full_attn.yaml --num-gpus 8
    torchrun --nproc-per-node 8 tools/train_net.py --config configs/retinanet_full_attn.yaml
    python tools/train_net.py --config configs/retinanet_full_attn.yaml --resume
    python tools/train_net.py --config configs/retinanet_full_attn.yaml --eval-only \
        MODEL.WEIGHTS output/model_final.pth

Any config key can be changed at the end of the command: SOLVER.IMS_PER_BATCH 16 OUTPUT_DIR out.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

import sasa_det  # noqa: F401  (registers models and datasets; before detectron2, see compat.py)

# isort: split
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm

from sasa_det.checkpoint import (
    CheckpointError,
    StrictCheckpointer,
    check_last_checkpoint,
    check_weights,
)
from sasa_det.config import check_model, check_processes, check_trainable, load_config
from sasa_det.data import check_config_datasets
from sasa_det.data.workers import UnusableImageError
from sasa_det.distributed import check_launch, launch, num_processes
from sasa_det.divergence import DivergedError
from sasa_det.engine import Trainer
from sasa_det.weight_files import RefusedWeightsError


def main(args: argparse.Namespace) -> None:
    """In each process; what the user can do something about ends in one sentence."""
    try:
        run(args)
    except (CheckpointError, DivergedError, RefusedWeightsError, UnusableImageError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    cfg = args.cfg
    start(cfg, args)
    if comm.is_main_process():
        for warning in args.dataset_warnings:
            logging.getLogger("detectron2").warning(warning)
    if cfg.MODEL.DEVICE == "cpu":
        logging.getLogger("detectron2").warning("No GPU is used: running on the CPU.")
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = StrictCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
        checkpoint = cfg.MODEL.WEIGHTS
        if args.resume and checkpointer.has_checkpoint():
            checkpoint = checkpointer.last_whole_checkpoint()
        checkpointer.resume_or_load(checkpoint, resume=False)
        Trainer.test(cfg, model, checkpoint=checkpoint)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def start(cfg: CfgNode, args: argparse.Namespace) -> None:
    """detectron2's ``default_setup``; but an evaluation leaves the config that it finds."""
    file = Path(cfg.OUTPUT_DIR, "config.yaml")
    before = file.read_bytes() if args.eval_only and file.is_file() else None
    comm.synchronize()  # all have read it
    default_setup(cfg, args)
    if before is not None and comm.is_main_process():
        file.write_bytes(before)


def setup(args: argparse.Namespace) -> CfgNode:
    """The checked config of the command line: what can be known to be wrong is said here.

    What is doubtful about the datasets becomes ``args.dataset_warnings``, a sentence each.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: with one sentence for the user.
    """
    cfg = load_config(args.config_file, args.opts)
    args.dataset_warnings = check_config_datasets(cfg, training=not args.eval_only)
    cfg.defrost()
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but this tool evaluates without augmentation; set it to "
            "False, or evaluate with detectron2's GeneralizedRCNNWithTTA."
        )
    check_model(cfg)
    weights = cfg.MODEL.WEIGHTS
    has_checkpoint = Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file()
    if args.eval_only and not weights and not (args.resume and has_checkpoint):
        raise ValueError(
            "--eval-only needs weights: add MODEL.WEIGHTS FILE, or --resume for the last "
            f"checkpoint of OUTPUT_DIR, which is {cfg.OUTPUT_DIR!r}."
        )
    if args.resume and has_checkpoint:  # then nobody reads the others
        check_last_checkpoint(cfg, training=not args.eval_only)
    else:
        check_weights(weights, cfg)
    if not args.eval_only and not args.resume:
        check_trainable(cfg)
    is_file = bool(weights) and "://" not in weights
    if args.eval_only and is_file and not args.resume and "OUTPUT_DIR" not in args.opts:
        cfg.OUTPUT_DIR = str(Path(weights).parent)  # results belong beside what they are of
    try:
        torch.device(cfg.MODEL.DEVICE)
    except RuntimeError as error:
        raise ValueError(
            f"MODEL.DEVICE must be a device of torch, for instance cuda or cpu, but is "
            f"{cfg.MODEL.DEVICE!r}."
        ) from error
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    check_launch(args, cfg.MODEL.DEVICE)
    if not args.eval_only:
        check_processes(cfg, num_processes(args))
    cfg.freeze()
    return cfg


def parse_args() -> argparse.Namespace:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--config", dest="config_file", help="the same as --config-file")
    args = parser.parse_args()
    if not args.config_file:
        parser.error("--config FILE is missing, for instance configs/retinanet_full_attn.yaml")
    return args


if __name__ == "__main__":
    arguments = parse_args()
    try:
        # Before processes are started: one sentence instead of a stack of frames from each.
        arguments.cfg = setup(arguments)
    except (FileNotFoundError, ValueError, CheckpointError) as error:
        sys.exit(f"error: {error}")
    launch(main, arguments, device=arguments.cfg.MODEL.DEVICE)
