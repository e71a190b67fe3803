"""A training that is killed, told to end or out of disk goes on as if nothing had happened."""

import logging
import os
import random
import resource
import signal
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command, run_tool
from conftest import CONFIGS
from torch import nn
from torch.multiprocessing import start_processes

import sasa_det  # noqa: F401

# isort: split
from sasa_det.checkpoint import CheckpointError, WholeCheckpointer, what_is_damaged
from sasa_det.config import load_config
from sasa_det.data import TrainLoader, build_train_mapper
from sasa_det.data.digits import generate_digits
from sasa_det.distributed import TERMINATED, termination_passed_on

# Two sizes and flips in another process: all that is random about the images.
TRAINING = ["tools/train_net.py", "--config", "configs/demo.yaml", "--resume"]
TRAINING += ["DATASETS.TEST", "()"]
TRAINING += ["DATASETS.TRAIN", "('sasa_digits_val',)", "SOLVER.IMS_PER_BATCH", 2]
TRAINING += ["INPUT.MIN_SIZE_TRAIN", "(32, 48)", "INPUT.RANDOM_FLIP", "horizontal"]
TRAINING += ["DATALOADER.NUM_WORKERS", 1, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.WARMUP_ITERS", 2]
STEPS = 10


def training(output, *options, kind=Command, **more):
    return kind(*TRAINING, "SOLVER.MAX_ITER", STEPS, "OUTPUT_DIR", output, *options, **more)


def final_weights(output):
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Its final weights, and how many seconds it took."""
    output = tmp_path_factory.mktemp("uninterrupted")
    start = time.monotonic()
    run = training(output, kind=run_tool)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return final_weights(output), time.monotonic() - start


def wait_for(command, happened):
    """False, if the command ends before that."""
    while not happened():
        if not command.is_running():
            return False
        time.sleep(0.0002)
    return True


def is_writing(output):
    return any(output.glob(".*.pth.part"))


def all_processes(command):
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    return [command.pid, *map(int, children)]


def assert_equal(weights, wanted):
    assert weights.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(weights[name], wanted[name])]
    assert not different


def train_with_kills(output, moments):
    """Until it has reached the end; how often it was killed, and how often at half a checkpoint.

    Each moment is a signal and the seconds until it comes, or None for while a file is written.
    """
    kills = halves = 0
    for number, seconds in moments:
        command = training(output)
        if seconds is None:
            wait_for(command, lambda: is_writing(output))
        else:
            command.join(seconds)
        if command.is_running():
            os.kill(command.pid, number)
        run = command.wait()
        if run.returncode == 0:
            return kills, halves
        assert run.returncode in (-number, TERMINATED), run.stdout[-2000:] + run.stderr[-2000:]
        kills += 1
        halves += is_writing(output)
    run = training(output, kind=run_tool)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return kills, halves


@pytest.fixture(scope="module")
def troubled(uninterrupted, tmp_path_factory):
    """A training that met all of it, one after the other: what was left each time, and where."""
    output = tmp_path_factory.mktemp("troubled")
    tag = output / "last_checkpoint"
    left = {}
    command = training(output)
    assert wait_for(command, lambda: is_writing(output) and tag.exists())
    os.kill(command.pid, signal.SIGKILL)
    left["killed"] = command.wait(), is_writing(output), tag.read_text()

    command = training(output)
    assert wait_for(command, lambda: tag.read_text() != left["killed"][2])
    for pid in all_processes(command):  # those that load images, too, as schedulers do
        os.kill(pid, signal.SIGTERM)
    left["told"] = command.wait(), is_writing(output), tag.read_text()

    left["full"] = (
        training(output, largest_file=2**20, kind=run_tool),
        is_writing(output),
        tag.read_text(),
    )
    left["finished"] = training(output, kind=run_tool), is_writing(output), tag.read_text()
    return left, output


def test_killed_while_a_checkpoint_is_written_it_leaves_half_of_it_under_another_name(troubled):
    run, is_half_there, name = troubled[0]["killed"]
    assert run.returncode == -signal.SIGKILL
    assert is_half_there
    assert what_is_damaged(troubled[1] / name) is None


def test_told_to_end_it_saves_the_running_step_and_leaves(troubled):
    left, output = troubled
    run, _, name = left["told"]
    assert run.returncode == TERMINATED == 143, run.stdout[-2000:] + run.stderr[-2000:]
    step = torch.load(output / name, weights_only=True)["iteration"]
    assert name == f"model_{step:07d}.pth"
    assert f"SIGTERM: saved {name} after step {step}; go on with the same command" in run.stdout


def test_told_to_end_in_an_evaluation_it_ends_that_and_the_step_and_saves(tmp_path):
    generate_digits(tmp_path / "sasa_digits", "val", 30, seed=0)
    evaluation = ["DATASETS.TEST", "('sasa_digits_val',)", "INPUT.MIN_SIZE_TEST", 32]
    environment = {"DETECTRON2_DATASETS": str(tmp_path)}
    command = training(tmp_path, *evaluation, "TEST.EVAL_PERIOD", 2, environment=environment)
    log = tmp_path / "log.txt"
    assert wait_for(command, lambda: log.exists() and "Inference done" in log.read_text())
    for pid in all_processes(command):
        os.kill(pid, signal.SIGTERM)
    run = command.wait()
    assert run.returncode == TERMINATED, run.stdout[-2000:] + run.stderr[-2000:]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_on_a_full_disk_it_says_so_and_the_last_checkpoint_is_whole(troubled):
    left, output = troubled
    run, is_half_there, name = left["full"]
    assert run.returncode == 1
    sentence = run.stderr.splitlines()[-1]
    assert sentence.startswith(f"error: The checkpoint '{output}/model_")
    assert "cannot be written: [Errno 27] File too large;" in sentence
    assert sentence.endswith(f"{output}/{name} is whole: make room, and go on with --resume.")
    assert name == left["told"][2]
    assert what_is_damaged(output / name) is None
    assert not is_half_there


def test_after_all_of_that_it_has_the_weights_of_one_that_was_never_interrupted(
    troubled, uninterrupted
):
    left, output = troubled
    run, is_half_there, name = left["finished"]
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert name == "model_final.pth"
    assert not is_half_there
    assert_equal(final_weights(output), uninterrupted[0])


@pytest.mark.slow
def test_killed_at_fifty_random_moments_it_comes_to_the_same_weights(uninterrupted, tmp_path):
    """Trainings one after the other, each resumed until it ends; a third of the signals SIGTERM."""
    wanted, seconds = uninterrupted
    seed = int.from_bytes(os.urandom(4))
    rng = random.Random(seed)
    counts = {"trainings": 0, "kills": 0, "at half a checkpoint": 0, "seed": seed}

    def moments():
        for _ in range(9):
            number = signal.SIGTERM if rng.random() < 1 / 3 else signal.SIGKILL
            yield number, None if rng.random() < 0.3 else rng.uniform(0, seconds)

    while counts["kills"] < 50:
        counts["trainings"] += 1
        output = tmp_path / str(counts["trainings"])
        kills, halves = train_with_kills(output, moments())
        counts["kills"] += kills
        counts["at half a checkpoint"] += halves
        assert_equal(final_weights(output), wanted)
    print(counts)


LOADING = """
import multiprocessing, os, signal, sys, time

import sasa_det
from sasa_det.config import load_config
from sasa_det.data import TrainLoader, build_train_mapper


def load():
    multiprocessing.set_start_method(sys.argv[1], force=True)
    options = ["DATASETS.TRAIN", "('sasa_digits_val',)", "DATALOADER.NUM_WORKERS", "2"]
    cfg = load_config("configs/demo.yaml", options)
    batches = iter(TrainLoader(cfg, build_train_mapper(cfg)))
    next(batches)
    return batches
"""
KILLED = """
if __name__ == "__main__":
    batches = load()
    print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
TOLD_AT_ONCE = """
def tell():
    os.kill(os.getpid(), signal.SIGTERM)


os.register_at_fork(after_in_child=tell)
if __name__ == "__main__":
    batches = load()
    assert len(multiprocessing.active_children()) == 2
    next(batches)
else:  # spawned
    tell()
"""


def run_loading(rest, start_method, folder):
    """A program that ``load()``s pictures in two processes."""
    program = folder / "program.py"
    program.write_text(LOADING + rest)
    return run_tool(program, start_method)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_what_loads_the_images_is_there_when_told_to_end_as_soon_as_it_starts(
    start_method, tmp_path
):
    run = run_loading(TOLD_AT_ONCE, start_method, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


OF_OTHERS = """
if __name__ == "__main__":
    batches = load()
    process = multiprocessing.Process(target=time.sleep, args=[60])
    process.start()
    process.terminate()
    process.join(30)
    assert process.exitcode == -signal.SIGTERM
"""


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_processes_that_load_no_images_can_be_told_to_end(start_method, tmp_path):
    run = run_loading(OF_OTHERS, start_method, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_what_loads_the_images_ends_with_a_training_that_is_killed(start_method, tmp_path):
    run = run_loading(KILLED, start_method, tmp_path)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    workers = [int(pid) for pid in run.stdout.split()]
    assert workers
    deadline = time.monotonic() + 30
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))


def drawn(start):
    """What a model would draw in three steps from there on."""
    options = ["SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(32,)"]
    cfg = load_config(
        str(CONFIGS / "demo.yaml"), [*options, "DATASETS.TRAIN", "('sasa_digits_val',)"]
    )
    loader = TrainLoader(cfg, build_train_mapper(cfg))
    loader.seed, loader.start = 0, start
    batches = islice(loader, 3)
    return [(float(torch.rand(())), np.random.rand(), random.random()) for _ in batches]


def test_what_a_model_draws_at_random_depends_on_the_step_only():
    first = drawn(0)
    torch.rand(5)
    assert drawn(1)[:2] == first[1:]
    assert len({number for step in first for number in step}) == 9


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.zeros(1000))


def save_three(folder):
    checkpointer = WholeCheckpointer(Counter(), str(folder), optimizer=Counter())
    for number in range(3):
        checkpointer.model.count.data.fill_(number)
        checkpointer.save(f"model_{number:07d}", iteration=number)
    torch.save({"model": Counter().state_dict()}, folder / "of_somebody.pth")
    return folder / "model_0000002.pth"


def resumed(folder):
    checkpointer = WholeCheckpointer(Counter(), str(folder), optimizer=Counter())
    return checkpointer.resume_or_load("", resume=True)["iteration"]


@pytest.fixture
def warnings():
    """What detectron2's log says; it does not pass it on."""
    messages = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("detectron2")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def change_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(path.stat().st_size)),
    "one bit": change_a_bit,
    "gone": Path.unlink,
    "name gone": lambda path: path.with_name("last_checkpoint").write_bytes(b""),
    "name is noise": lambda path: path.with_name("last_checkpoint").write_bytes(b"\0\xff/"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_last_whole_one_resumed(damage, tmp_path, warnings):
    last = save_three(tmp_path)
    assert resumed(tmp_path) == 2
    assert warnings == []
    DAMAGES[damage](last)
    by_name = damage in ("gone", "name gone", "name is noise")
    assert resumed(tmp_path) == (2 if damage.startswith("name") else 1)
    (warning,) = warnings
    assert str(tmp_path / "last_checkpoint" if by_name else last) in warning
    assert ".pth." in warning.split("going on from ")[1]
    assert "\n" not in warning


def test_where_none_is_whole_it_does_not_start_anew(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob("model_*"):
        change_a_bit(path)
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* start without --resume"):
        resumed(tmp_path)


def test_a_later_step_of_an_earlier_training_is_not_taken_for_the_last(tmp_path):
    last = save_three(tmp_path)
    (tmp_path / "model_0000001.pth").rename(tmp_path / "model_0009999.pth")
    earlier = (tmp_path / "model_0009999.pth").stat().st_mtime - 1000
    os.utime(tmp_path / "model_0009999.pth", (earlier, earlier))
    last.unlink()
    assert resumed(tmp_path) == 0


def test_a_checkpoint_that_cannot_be_written_leaves_no_trace(tmp_path):
    save_three(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"0000003.*File too large; .*0000002.pth is whole"
        ):
            WholeCheckpointer(Counter(), str(tmp_path)).save("model_0000003")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def leave_when_told(rank, folder):
    def leave(*signal_and_frame):
        (folder / f"told{rank}").touch()
        sys.exit(TERMINATED)

    signal.signal(signal.SIGTERM, leave)
    (folder / f"ready{rank}").touch()
    time.sleep(20)


def test_the_processes_that_a_tool_starts_are_told_too(tmp_path):
    def tell():
        while len(list(tmp_path.glob("ready*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as left, termination_passed_on():
        start_processes(leave_when_told, (tmp_path,), nprocs=2, start_method="fork")
    thread.join()
    assert left.value.code == TERMINATED
    assert sorted(path.name for path in tmp_path.glob("told*")) == ["told0", "told1"]
