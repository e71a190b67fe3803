"""The operator in forked processes, whose parent has used it with several threads.

OpenMP's threads do not come along, and GNU's waits for them for ever.
"""

import subprocess
import sys

import pytest
from conftest import ROOT

from sasa_det.ops import available_backends

PROGRAM = """
import multiprocessing, sys
import torch
from torch.utils.data import DataLoader
from sasa_det.ops import local_attention, use_backend

torch.set_num_threads(2)
context = multiprocessing.get_context("fork")

def call():
    maps = torch.randn(3, 2, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    query = maps[0].requires_grad_()
    with use_backend("native"):
        output = local_attention(query, *maps[1:], None, None, num_heads=2, kernel_size=5)
        output.sum().backward()
    return output.detach(), query.grad

def equals_the_parents():
    for here, there in zip(call(), wanted):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-5)

def insists_on_threads_and_forks():
    torch.set_num_threads(2)
    equals_the_parents()
    sys.exit(outcome(equals_the_parents, 60))

def outcome(function, seconds):
    child = context.Process(target=function)
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode

class Images:
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return call()[0]

wanted = call()
print(outcome(equals_the_parents, 60), outcome(insists_on_threads_and_forks, 120))
loader = DataLoader(Images(), batch_size=None, num_workers=2, timeout=60)
print(all(torch.allclose(output, wanted[0], rtol=1e-5, atol=1e-5) for output in loader))
print(torch.get_num_threads())
"""


@pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")
def test_forked_processes_compute_as_their_parent_did():
    """Children, grandchildren, and the workers of a data loader; the parent keeps its threads."""
    # Not by run_tool, whose processes are forked themselves.
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "0 0\nTrue\n2\n", run.stdout + run.stderr[-3000:]
