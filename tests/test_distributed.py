"""Several processes train and evaluate as one does; started by torchrun, on CPUs, with Gloo."""

import copy
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

from sasa_det.compat import create_local_process_group
from sasa_det.distributed import TERMINATED, _in_process, check_launch

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def start(log, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, *map(str, arguments)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def finish(log, *arguments):
    assert start(log, *arguments).wait() == 0, log.read_text()[-3000:]
    return log.read_text()


def kill(process):
    """With all its ranks, to which the signal would not be passed on."""
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in (process.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        shape = (40, 60, 3) if number % 2 else (60, 40, 3)
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        picture.save(folder / "pictures" / f"{number:02}.png")
    ranks.register_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def two(folder):
    finish(folder / "log.txt", "tests/ranks.py", folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.fixture(scope="module")
def one(folder, two):
    """The same in this process, with all of each batch; it evaluates the weights of the two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    synchronised = ranks.train(folder / "one", *ranks.SYNCHRONISED)
    trainer = synchronised.pop("trainer")
    synchronised["weights"] = copy.deepcopy(synchronised["weights"])
    trainer.model.load_state_dict(two["synchronised"]["weights"])
    yield {
        "synchronised": synchronised,
        "AP": ranks.evaluate(trainer),
        "in parts": ranks.train(folder / "one_whole", *ranks.IN_PARTS),
        "spoiled": ranks.train(
            folder / "one_spoiled", *ranks.SPOILED, kind=ranks.SpoiledDoubleTrainer
        ),
    }
    torch.set_num_threads(threads)


def test_torchrun_tells_detectron2_which_processes_share_a_machine(two):
    assert two["world size"] == 2
    assert two["local"] == (0, 2)


def test_no_thread_of_a_process_group_is_left_that_could_abort_a_process_as_it_ends(two, folder):
    for rank in range(2):
        threads = (folder / f"threads_{rank}.txt").read_text().splitlines()
        assert threads
        assert not [name for name in threads if "gloo" in name]


@pytest.mark.parametrize("status", [None, TERMINATED, "error: there is no such image."])
def test_whatever_a_process_says_as_it_leaves_its_groups_are_gone(status):
    def main(args):
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
        model(torch.ones(1, 2)).sum().backward()
        if status is not None:
            sys.exit(status)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    create_local_process_group(1)
    with nullcontext() if status is None else pytest.raises(SystemExit) as left:
        _in_process(main, Namespace())
    assert status is None or left.value.code == status
    assert not dist.is_initialized()
    assert not [name for name in ranks.names_of_threads() if "gloo" in name]


@pytest.mark.parametrize("training", ["synchronised", "in parts"])
def test_two_ranks_with_half_the_batch_each_have_the_losses_of_one_with_the_whole(
    one, two, training
):
    wanted, actual = one[training]["losses"], two[training]["losses"]
    assert len(wanted) == 4
    for step, other in zip(wanted, actual):
        # detectron2 computes the focal loss in float32 whatever it is given.
        assert other == pytest.approx(step, rel=5e-7)
    assert wanted[0] != pytest.approx(wanted[-1], rel=1e-2)  # they are no constants


@pytest.mark.parametrize("training", ["synchronised", "in parts", "spoiled"])
def test_they_come_to_the_same_weights_and_statistics(one, two, training):
    wanted, actual = one[training]["weights"], two[training]["weights"]
    for name, tensor in wanted.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-7, atol=1e-8, msg=name)


def test_both_skip_the_batch_whose_loss_is_not_finite_in_one(one, two):
    assert one["spoiled"]["trainer"]._trainer.num_skipped == 1
    assert two["skipped"] == [1, 1]


def test_both_skip_the_batch_whose_proposals_are_not_finite_in_one(two):
    (skipped, weights), (skipped_there, weights_there) = two["proposing"]
    assert skipped == skipped_there == 1
    for name, tensor in weights.items():
        assert tensor.isfinite().all(), name
        # Batch norm's averages are each rank's own.
        assert "running" in name or torch.equal(weights_there[name], tensor), name


def test_evaluation_shared_out_to_two_ranks_gives_the_figures_of_one(one, two):
    assert one["AP"]["bbox"]["AP50"] > 0
    assert two["AP"]["bbox"] == pytest.approx(one["AP"]["bbox"], rel=1e-12, nan_ok=True)


def test_a_batch_is_shared_out_whatever_is_random_about_it(two, folder):
    whole = ranks.batches()
    for batch, *parts in zip(whole, *two["batches"]):
        assert sorted(batch) == sorted(parts[0] + parts[1])
        # Wide and high pictures are not mixed, sizes and flips are.
        assert len({height > width for _, _, height, width, _ in batch}) == 1
    assert len({picture for batch in whole for picture in batch}) > 12


def test_batches_do_not_depend_on_workers_and_on_where_one_starts(folder):
    assert ranks.batches(num_workers=2) == ranks.batches()
    assert ranks.batches(start=3)[:2] == ranks.batches()[3:]


def test_a_run_on_two_ranks_that_is_killed_resumes_to_the_same_weights_bit_for_bit(two, folder):
    output, log = folder / "killed", folder / "killed.txt"
    command = ["tools/train_net.py", "--config", ranks.DEMO, "--resume", *ranks.SMALL]
    command += [*ranks.SYNCHRONISED, "DATASETS.TEST", "()", "OUTPUT_DIR", output]
    process = start(log, *command)
    while not (output / "last_checkpoint").exists():
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.01)
    kill(process)
    # Wherever it was by then: on from the first checkpoint.
    (output / "last_checkpoint").write_text("model_0000001.pth")
    assert "Starting training from iteration 2" in finish(log, *command)
    resumed = torch.load(output / "model_final.pth", weights_only=True)["model"]
    for name, tensor in two["float32"].items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize(
    ("options", "device", "sentence"),
    [
        ({"num_gpus": 8}, "cpu", "--num-gpus and --num-machines are not for torchrun"),
        ({}, "cuda", "torchrun started 99 processes here, but this machine has"),
    ],
)
def test_what_torchrun_cannot_start_is_said(monkeypatch, options, device, sentence):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "99")
    args = Namespace(**{"num_gpus": 1, "num_machines": 1, **options})
    with pytest.raises(ValueError, match=sentence):
        check_launch(args, device)
