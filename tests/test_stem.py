"""The attention stem pools before it normalises, and nobody can tell but by its memory."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import sasa_det  # noqa: F401

# isort: split
from detectron2.layers import FrozenBatchNorm2d

from sasa_det.modeling import AttentionStem


def make_stem(norm="BN"):
    torch.manual_seed(0)
    stem = AttentionStem(3, 16, norm=norm, num_heads=2).double()
    with torch.no_grad():
        stem.norm.weight.copy_(torch.randn(16))  # half of them turn a maximum into a minimum
        stem.norm.bias.copy_(torch.randn(16))
        stem.norm.running_mean.copy_(torch.randn(16) * 0.1)
        stem.norm.running_var.copy_(torch.rand(16) + 0.5)
    return stem


def at_full_resolution(stem, images):
    x = F.relu(stem.norm(stem.attention(images)))
    return F.max_pool2d(x, kernel_size=4, stride=4, ceil_mode=True)


@pytest.mark.parametrize("size", [(16, 24), (13, 18)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_it_equals_attention_norm_relu_and_pooling_one_after_another(training, size):
    stem = make_stem().train(training)
    plain = copy.deepcopy(stem)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    output, wanted = stem(images), at_full_resolution(plain, images)
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(stem.norm.state_dict(), plain.norm.state_dict())
    grad = torch.randn_like(output)
    output.backward(grad)
    wanted.backward(grad)
    for (name, p), q in zip(stem.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_it_serves_frozen_norms_and_averages_without_momentum():
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stem = make_stem()
    stem.norm.momentum = None
    plain = copy.deepcopy(stem)
    for _ in range(2):
        torch.testing.assert_close(stem(images), at_full_resolution(plain, images))
    torch.testing.assert_close(stem.norm.state_dict(), plain.norm.state_dict())
    stem.norm = FrozenBatchNorm2d.convert_frozen_batchnorm(stem.norm)
    torch.testing.assert_close(stem(images), at_full_resolution(stem, images))


def test_it_works_in_bfloat16_and_with_hooks_on_its_norm():
    images = torch.randn(2, 3, 16, 16)
    stem = make_stem().float()
    half = copy.deepcopy(stem).bfloat16()
    for training in (True, False):
        wanted = stem.train(training)(images)
        error = (half.train(training)(images.bfloat16()).float() - wanted).norm()
        assert error <= 2e-2 * wanted.norm()
    called = []
    stem.norm.register_forward_hook(lambda *_: called.append(True))
    torch.testing.assert_close(stem(images), wanted, rtol=1e-4, atol=1e-5)
    assert called


def test_norms_without_running_statistics_or_weights_are_served():
    images = torch.randn(2, 3, 8, 8)
    for options in ({"track_running_stats": False}, {"affine": False}):
        stem = AttentionStem(3, 16, norm=lambda c, options=options: nn.BatchNorm2d(c, **options))
        plain = copy.deepcopy(stem)
        torch.testing.assert_close(stem(images), at_full_resolution(plain, images))


def test_a_norm_that_starts_at_zero_learns():
    stem = make_stem()
    nn.init.zeros_(stem.norm.weight)
    nn.init.ones_(stem.norm.bias)
    stem(torch.randn(2, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
    assert stem.norm.weight.grad.abs().min() > 0


@pytest.mark.parametrize("norm", ["GN", ""])
def test_with_other_norms_it_keeps_the_full_resolution(norm):
    stem = AttentionStem(3, 32, norm=norm)
    images = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(stem(images), at_full_resolution(stem, images))


def test_an_image_that_needs_a_gradient_gets_one():
    stem = make_stem()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    stem(images).sum().backward()
    assert images.grad.abs().sum() > 0


TWO_RANKS = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
sys.path.insert(0, "tests")
from test_stem import make_stem

def step(stem, images):
    stem(images).square().sum().backward()
    return [p.grad for p in stem.parameters()] + [stem.norm.running_mean, stem.norm.running_var]

def run(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 8, 12, dtype=torch.float64, generator=generator)
    stem = make_stem("SyncBN").train()
    results = step(stem, images[:1] if rank == 0 else images[1:])
    for gradient in results[:-2]:
        dist.all_reduce(gradient)
    for actual, wanted in zip(results, step(make_stem("BN").train(), images)):
        torch.testing.assert_close(actual, wanted)
    dist.destroy_process_group()  # else its threads may abort the process as it ends

if __name__ == "__main__":
    mp.spawn(run, (sys.argv[1],), nprocs=2)
"""


def test_synchronised_over_two_ranks_it_equals_one_rank_with_all_images(tmp_path):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, str(script), str(tmp_path / "rendezvous")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stderr


def test_no_tensor_of_the_images_size_is_kept():
    stem = AttentionStem(3, 64)
    assert isinstance(stem.norm, nn.BatchNorm2d)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        stem(torch.randn(1, 3, 64, 64))
    assert max(x.numel() for x in saved) <= 64 * 16 * 16
