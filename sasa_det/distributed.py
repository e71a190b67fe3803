"""Starting a tool in several processes: by detectron2's launch, or by torchrun or whoever else."""

import argparse
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import launch as launch_by_detectron2
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import ProcessExitedException

from sasa_det.compat import create_local_process_group, destroy_process_groups

# The exit status that shells report of a process that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM

# What torchrun tells each process that it starts.
_TOLD = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(main: Callable, args: argparse.Namespace, *, device: str) -> None:
    """Runs ``main(args)`` in every process of the training.

    Under torchrun, this process is one of them. Otherwise detectron2 starts them, one for each GPU.

    Args:
        args: of detectron2's ``default_argument_parser``.
        device (str): where the model lives: the processes talk by NCCL on "cuda", Gloo on "cpu".
    """
    if not is_started_by_torchrun():
        with termination_passed_on():
            launch_by_detectron2(
                partial(_in_process, main),
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Longer than torch's own: the others wait while the first process evaluates.
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    _in_process(main, args)


def _in_process(main: Callable, args: argparse.Namespace) -> None:
    """Runs ``main(args)``, and leaves no thread of a process group that could abort the process."""
    status = None
    try:
        main(args)
    except SystemExit as error:
        status = error.code
    # Not within "except", where the error holds main's frames, these the model, and it a group.
    together = status in (None, TERMINATED)  # else NCCL may wait for others, who do not come
    if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
        destroy_process_groups()
    if status is not None:
        sys.exit(status)


def check_launch(args: argparse.Namespace, device: str) -> None:
    """Raises ValueError, in one sentence, where the processes asked for cannot be started."""
    gpus = torch.cuda.device_count()
    if is_started_by_torchrun():
        if args.num_gpus != 1 or args.num_machines != 1:
            raise ValueError(
                "--num-gpus and --num-machines are not for torchrun, which started this already; "
                "give torchrun --nproc-per-node and --nnodes instead."
            )
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        if device.startswith("cuda") and local > gpus:
            raise ValueError(
                f"torchrun started {local} processes here, but this machine has {gpus} GPUs; give "
                f"it --nproc-per-node {gpus}."
            )
    elif args.num_gpus < 1:
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but must be 1 or more; MODEL.DEVICE cpu uses none."
        )
    elif args.num_gpus > 1 and args.num_gpus > gpus:
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but this machine has {gpus}; several processes on "
            f"CPUs are started by torchrun --nproc-per-node {args.num_gpus}."
        )


def is_started_by_torchrun() -> bool:
    """Or by whatever else sets the same environment variables."""
    return all(name in os.environ for name in _TOLD)


def num_processes(args: argparse.Namespace) -> int:
    """Of the whole training, before they talk to each other."""
    if is_started_by_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return args.num_gpus * args.num_machines


def broadcast_buffers(model: nn.Module) -> None:
    """Gives all processes the first one's buffers: batch norms that are not synchronised differ."""
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def any_process(is_true: bool) -> bool:
    """Whether it is true in any process of the training; all of them must ask."""
    if comm.get_world_size() == 1:
        return is_true
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    is_true_anywhere = torch.tensor(float(is_true), device=device)
    dist.all_reduce(is_true_anywhere, dist.ReduceOp.MAX)
    return bool(is_true_anywhere)


@contextmanager
def termination_passed_on() -> Iterator[None]:
    """Passes SIGTERM on to the processes that are started within, and leaves when they have.

    Without such processes, it does what it would have done.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = [x for x in multiprocessing.active_children() if not x.daemon]
        for process in children:
            process.terminate()
        if not children:
            signal.signal(signal.SIGTERM, before)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code not in (TERMINATED, -signal.SIGTERM):
            raise
        sys.exit(TERMINATED)
    finally:
        signal.signal(signal.SIGTERM, before)
