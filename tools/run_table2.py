#!/usr/bin/env python
"""Trains and evaluates the rows of the paper's Table 2, and ours with attention in the FPN.

    python tools/run_table2.py --seeds 0 1 --num-gpus 8 --output output/table2
    python tools/run_table2.py --config configs/demo.yaml --jobs 2 --output output/table2_demo
    python tools/run_table2.py --config configs/demo.yaml --dry-run

--config is what the rows share; each adds the MODEL.SASA keys of its own file in configs/. All
rows of the first seed come first. Some steps of each row are timed before, to say what all will
cost. The same command again continues where it was stopped, and keeps what is finished. Leaves
OUTPUT/ROW/seedN as tools/train_net.py does, and OUTPUT/table2.md and table2.json. Any config key
but those can be changed at the end of the command: SOLVER.MAX_ITER 1000.
"""

# Each run is a process of tools/train_net.py: memory and random numbers begin anew, and a crash
# takes one run with it, not the others.

import argparse
import contextlib
import fcntl
import json
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import train_net
import yaml
from tabulate import tabulate

from sasa_det import env
from sasa_det.analysis import ModelCost
from sasa_det.analysis.progress import Pace, PlannedRun, duration, last_metrics
from sasa_det.analysis.table2 import ROWS, RowResult, as_data, as_markdown, cell, count_as_tested
from sasa_det.analysis.trainings import CONSOLE_FILE, Training, Trainings, recorded_seconds
from sasa_det.evaluation import AP_NAMES
from sasa_det.whole_files import write_text

CONFIGS = Path(__file__).parent.parent / "configs"
HISTORY_FILE = "runs.jsonl"
STATUS_SECONDS = 30
MIN_TIMED_STEPS = 5  # detectron2 leaves the first three out


def main(args: argparse.Namespace) -> None:
    runs = plan(args)
    finished = [run for run in runs if run.is_finished()]
    waiting = [run for run in runs if run not in finished]
    args.cfg = runs[0].cfg  # for what is the same in all
    args.machine = describe_machine(args, args.cfg.MODEL.DEVICE)
    args.output.mkdir(parents=True, exist_ok=True)
    with locked(args.output) as lock:
        costs = {run.row: count_as_tested(run.cfg) for run in runs if run.seed == args.seeds[0]}
        start = starter(args, lock)
        pace = Pace(args.jobs)
        if waiting:
            measure(args, pace, runs, waiting, start)
            say(estimate(args, runs, waiting, costs, pace))
        if args.dry_run:
            return
        failed = train(args, finished, waiting, costs, pace, start)
        write_table(args, finished, costs)
    say(f"\n{(args.output / 'table2.md').read_text()}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}. Each has a "
            f"{CONSOLE_FILE} in its folder; the same command tries them again."
        )


def plan(args: argparse.Namespace) -> list[PlannedRun]:
    """All runs, in their order, with checked configs.

    Raises:
        FileNotFoundError, ValueError: with one sentence for the user.
    """
    runs = []
    keys = {row: row_keys(row) for row in args.rows}
    taken = {"SEED", "OUTPUT_DIR", *(key for of_row in keys.values() for key in of_row)}
    for key in args.opts[::2]:
        if key in taken:
            raise ValueError(
                f"{key} is not for the command line here: the rows differ in their MODEL.SASA, "
                "--seeds gives the seeds, --output the folder."
            )
    for seed in args.seeds:
        for row in args.rows:
            folder = args.output / row / f"seed{seed}"
            own = {**keys[row], "SEED": str(seed), "OUTPUT_DIR": str(folder)}
            overrides = [*args.opts, *(text for pair in own.items() for text in pair)]
            asked = argparse.Namespace(
                config_file=str(args.config),
                opts=overrides,
                eval_only=False,
                resume=True,
                num_gpus=args.num_gpus,
                num_machines=1,
            )
            cfg = train_net.setup(asked)
            if len(cfg.DATASETS.TEST) != 1:
                raise ValueError(
                    f"DATASETS.TEST is {cfg.DATASETS.TEST}, but the table needs exactly one."
                )
            if cfg.MODEL.META_ARCHITECTURE != "SASARetinaNet":
                raise ValueError(
                    f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, but only of "
                    "SASARetinaNet's heads there are rows; change it in --config."
                )
            runs.append(PlannedRun(row, seed, folder, overrides, cfg))
    return runs


def row_keys(row: str) -> dict[str, str]:
    """What the row's own config file says of MODEL.SASA, as overrides of the shared config."""
    own = yaml.safe_load((CONFIGS / f"{row}.yaml").read_text())["MODEL"]["SASA"]
    return {f"MODEL.SASA.{key}": str(value) for key, value in own.items()}


def describe_machine(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Raises ValueError for what --num-gpus and --jobs cannot be on this device."""
    on_gpu = device.startswith("cuda")
    if on_gpu and args.jobs > 1:
        raise ValueError(f"--jobs is {args.jobs}, but on GPUs one run takes all; leave it out.")
    if args.num_gpus > 1 and (not on_gpu or args.num_gpus > torch.cuda.device_count()):
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but there are "
            f"{torch.cuda.device_count() if on_gpu else 0} GPUs to train on here."
        )
    machine = env.describe("cuda" if on_gpu else "cpu")
    if on_gpu:
        return {**machine, "GPUs": args.num_gpus}
    threads = max(1, machine["cores"] // args.jobs) if args.jobs > 1 else machine["threads"]
    return {**machine, "threads": threads, "runs at once": args.jobs}


@contextlib.contextmanager
def locked(output: Path) -> Iterator[int]:
    """Trainings inherit the lock: should one survive this process, nobody starts another there."""
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"Another run_table2.py, or a training that one left, is at work in {output}."
            ) from None
        yield file.fileno()


def starter(args: argparse.Namespace, lock: int) -> Callable[[PlannedRun], Training]:
    """Starts a run as a process of tools/train_net.py; runs at once share the cores."""
    threads = args.machine["threads"] if args.jobs > 1 else None
    fixed = [sys.executable, train_net.__file__, "--config", str(args.config), "--resume"]
    fixed += ["--num-gpus", str(args.num_gpus)]
    return lambda run: Training(run, [*fixed, *run.overrides], threads, lock)


def measure(
    args: argparse.Namespace,
    pace: Pace,
    runs: Sequence[PlannedRun],
    waiting: Sequence[PlannedRun],
    start: Callable[[PlannedRun], Training],
) -> None:
    """Seconds a step of each row that waits: from steps already trained, or from some taken now.

    Raises:
        RuntimeError: if a row cannot be trained, with its reason.
    """
    for run in runs:
        earlier = last_metrics(run.folder)
        if "time" in earlier:
            pace.of_row.setdefault(run.row, earlier["time"])
    unknown = {run.row: run for run in waiting if run.row not in pace.of_row}
    if not unknown or not args.timed_steps:
        return
    say(f"Timing {args.timed_steps} steps of each of {len(unknown)} rows.")
    with tempfile.TemporaryDirectory(prefix=".timing_", dir=args.output) as folder:
        timed = []
        for row, run in unknown.items():
            short = ["SOLVER.MAX_ITER", str(args.timed_steps), "DATASETS.TEST", "()"]
            short += ["OUTPUT_DIR", f"{folder}/{row}"]
            overrides = [*run.overrides, *short]
            timed.append(run._replace(folder=Path(folder) / row, overrides=overrides))
        with Trainings(timed, start, args.jobs, args.output / HISTORY_FILE) as trainings:
            for training in trainings.events(STATUS_SECONDS):
                if training is None:
                    continue
                if training.process.returncode:
                    raise RuntimeError(
                        f"{training.run.row} cannot be trained: {training.last_words()}"
                    )
                step = pace.of_row[training.run.row] = training.metrics["time"]
                pace.start_up = max(pace.start_up, training.seconds - args.timed_steps * step)


def estimate(
    args: argparse.Namespace,
    runs: Sequence[PlannedRun],
    waiting: Sequence[PlannedRun],
    costs: dict[str, ModelCost],
    pace: Pace,
) -> str:
    """What it will cost: of each row, then of all."""
    solver = args.cfg.SOLVER
    lines = []
    for row, cost in costs.items():
        of_row = [run for run in runs if run.row == row]
        step, to_do = pace.of_row.get(row), sum(run in waiting for run in of_row)
        counted = [f"{cost.params / 1e6:.2f}", f"{cost.flops_executed / 1e9:.3g}"]
        time_needed = ["-" if step is None else f"{step:.3g}", duration(pace.seconds(of_row[0], 0))]
        lines.append([row, *counted, f"{to_do} of {len(of_row)}", *time_needed])
    headers = ["row", "params (M)", "GFLOPs", "runs to do", "s a step", "time a run"]
    alignment = ("left", *["right"] * (len(headers) - 1))
    table = tabulate(lines, headers, disable_numparse=True, colalign=alignment)
    seconds = pace.left([], waiting)
    time_left = "a time unknown without timed steps"
    if seconds is not None:
        time_left = f"about {duration(seconds)}"
        if "GPUs" in args.machine:
            time_left += f", {seconds * args.num_gpus / 3600:.1f} GPU-hours"
    where = f"{args.num_gpus} GPUs" if "GPUs" in args.machine else f"the CPU, {args.jobs} at once"
    steps, batch = solver.MAX_ITER, solver.IMS_PER_BATCH
    return (
        f"{table}\n\nEach run: {steps:,} steps of {batch} images, {steps * batch:,} images. "
        f"{len(runs) - len(waiting)} of {len(runs)} runs are finished.\n"
        f"The others take {time_left} on {where}: start, steps,\nand evaluation, an image of which "
        "is taken as a third of one in a step. Each keeps a checkpoint every\n"
        f"{solver.CHECKPOINT_PERIOD:,} steps, from which it continues when it was stopped.\n"
    )


def train(
    args: argparse.Namespace,
    finished: list[PlannedRun],
    waiting: Sequence[PlannedRun],
    costs: dict[str, ModelCost],
    pace: Pace,
    start: Callable[[PlannedRun], Training],
) -> list[PlannedRun]:
    """Trains what waits, says how far it is, keeps the table current; returns what failed.

    ``finished`` grows.
    """
    began, number = time.monotonic(), len(finished) + len(waiting)
    failed: list[PlannedRun] = []
    with Trainings(waiting, start, args.jobs, args.output / HISTORY_FILE) as trainings:
        for training in trainings.events(STATUS_SECONDS):
            if training is None:
                text = "; ".join(status(running, pace) for running in trainings.running)
            else:
                succeeded = training.process.returncode == 0 and training.run.is_finished()
                (finished if succeeded else failed).append(training.run)
                text = outcome(training, succeeded)
                write_table(args, finished, costs)
            left = pace.left([(t.run, t.steps_done) for t in trainings.running], trainings.waiting)
            say(
                f"[{duration(time.monotonic() - began)}] {text} "
                f"({len(finished)} of {number} runs finished, {duration(left)} left)"
            )
    return failed


def status(training: Training, pace: Pace) -> str:
    """The step and the loss of what runs; its time a step is what is reckoned with from now on."""
    metrics, run, steps = training.metrics, training.run, training.steps_done
    if "time" in metrics:
        pace.of_row[run.row] = metrics["time"]
    loss = f", loss {metrics['total_loss']:.3g}" if "total_loss" in metrics else ""
    return (
        f"{run}: step {steps:,} of {run.steps:,}{loss}, {duration(pace.seconds(run, steps))} left"
    )


def outcome(training: Training, succeeded: bool) -> str:
    run = training.run
    if not succeeded:
        return f"{run} FAILED: {training.last_words()}"
    figures = run.figures()
    shown = "  ".join(f"{name} {cell([figures[name]])}" for name in AP_NAMES)
    return f"{run}: {shown}, in {duration(training.seconds)}"


def write_table(
    args: argparse.Namespace, finished: Sequence[PlannedRun], costs: dict[str, ModelCost]
) -> None:
    """The figures of what is finished, to table2.md and table2.json."""
    results = []
    for row, cost in costs.items():
        figures = {run.seed: run.figures() for run in finished if run.row == row}
        results.append(RowResult(row, cost, dict(sorted(figures.items()))))
    solver, size = args.cfg.SOLVER, args.cfg.INPUT.MIN_SIZE_TEST
    facts = {
        "command": args.command,
        "dataset": args.cfg.DATASETS.TEST[0],
        "image_size": size,
        "steps": solver.MAX_ITER,
        "images_a_step": solver.IMS_PER_BATCH,
        "seconds": recorded_seconds(args.output / HISTORY_FILE),
        "machine": args.machine,
    }
    text = [
        as_markdown(results),
        f"\nOn `{facts['dataset']}`, after {solver.MAX_ITER:,} steps of {solver.IMS_PER_BATCH} "
        f"images; of several seeds the mean (least to greatest). GFLOPs of {size}x{size} pixels, a "
        f"multiply and an add being two, as executed.\n\n    {args.command}\n\n"
        f"All processes together took {duration(facts['seconds'])}. The machine:\n",
        *(f"- {name}: {value}" for name, value in args.machine.items()),
    ]
    write_text("\n".join(text) + "\n", args.output / "table2.md")
    content = json.dumps({**facts, "rows": as_data(results)}, indent=2)
    write_text(content + "\n", args.output / "table2.json")


def say(text: str) -> None:
    print(text, flush=True)  # at once, into a file too


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        default=CONFIGS / "base_retinanet.yaml",
        help="what the rows share (default: configs/base_retinanet.yaml, COCO)",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=list(ROWS), help="default: all")
    parser.add_argument("--seeds", nargs="+", metavar="N", default=["0"], help="default: 0")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="for each run")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, on a CPU")
    parser.add_argument("--output", type=Path, default=Path("output/table2"), metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="say what it will cost, and stop")
    parser.add_argument(
        *("--timed-steps",),
        type=int,
        default=20,
        metavar="N",
        help="of each row, for the estimate; 0 starts at once (default: 20)",
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="change keys of the config")
    args = parser.parse_args()
    args.command = shlex.join(["python", "tools/run_table2.py", *sys.argv[1:]])
    args.rows, behind_rows = until_key(args.rows)
    args.seeds, behind_seeds = until_key(args.seeds)
    args.opts += behind_rows + behind_seeds
    unknown = [row for row in args.rows if row not in ROWS]
    if unknown:
        parser.error(f"there is no row {', '.join(unknown)}; the rows are {', '.join(ROWS)}")
    if not all(seed.isdecimal() for seed in args.seeds):
        parser.error(f"seeds are numbers from 0, but --seeds has {' '.join(args.seeds)}")
    args.seeds = list(dict.fromkeys(map(int, args.seeds)))
    args.rows = list(dict.fromkeys(args.rows))
    if args.timed_steps and args.timed_steps < MIN_TIMED_STEPS:
        parser.error(
            f"--timed-steps is {args.timed_steps}, but it takes {MIN_TIMED_STEPS} to time one, or 0"
        )
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}, but at least one run must be at work")
    return args


def until_key(values: list[str]) -> tuple[list[str], list[str]]:
    """argparse cannot tell where a list ends and KEY VALUE begins: keys have a dot."""
    end = next((i for i, value in enumerate(values) if "." in value), len(values))
    return values[:end], values[end:]


if __name__ == "__main__":
    arguments = parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as it is under nohup
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C: trainings stop, too
    try:
        main(arguments)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(f"\nStopped. The same command continues:\n    {arguments.command}", file=sys.stderr)
        sys.exit(130)
