"""Activation checkpointing: less is kept for the backward pass, and nothing else changes."""

import pytest
import torch
from torch import nn

import sasa_det  # noqa: F401

# isort: split
from conftest import CONFIGS
from detectron2.modeling import build_backbone

from sasa_det.config import load_config

STAGES = {"attention": "('res2', 'res3', 'res4', 'res5')", "convolution": "()"}


def train_once(stages, norm, checkpointing):
    """Gradients, running statistics and bytes kept for the backward, weights aside."""
    overrides = ["MODEL.SASA.ATTENTION_STAGES", stages, "MODEL.RESNETS.NORM", norm]
    overrides += ["MODEL.SASA.ACTIVATION_CHECKPOINTING", str(checkpointing)]
    torch.manual_seed(0)
    backbone = build_backbone(load_config(str(CONFIGS / "demo.yaml"), overrides)).train()
    weights = {x.untyped_storage().data_ptr() for x in backbone.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        features = backbone(torch.randn(2, 3, 64, 96))
    bytes_kept = sum(number for number, _ in kept.values())
    sum(x.square().mean() for x in features.values()).backward()
    gradients = {name: x.grad for name, x in backbone.named_parameters()}
    return gradients, dict(backbone.named_buffers()), backbone.state_dict().keys(), bytes_kept


@pytest.fixture(scope="module", params=[(s, n) for s in STAGES for n in ("BN", "SyncBN")])
def with_and_without(request):
    stages, norm = request.param
    return [train_once(STAGES[stages], norm, checkpointing) for checkpointing in (True, False)]


def test_gradients_are_the_same(with_and_without):
    (actual, *_), (wanted, *_) = with_and_without
    assert all(wanted[name].abs().sum() > 0 for name in wanted if name.endswith("conv1.weight"))
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def test_batch_norm_counts_a_batch_once(with_and_without):
    (_, actual, *_), (_, wanted, *_) = with_and_without
    assert any(name.endswith("num_batches_tracked") for name in wanted)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_weights_keep_their_names(with_and_without):
    (_, _, actual, _), (_, _, wanted, _) = with_and_without
    assert actual == wanted


def test_less_than_two_thirds_is_kept(with_and_without):
    *_, kept = with_and_without[0]
    *_, kept_without = with_and_without[1]
    assert kept < 2 / 3 * kept_without


def test_evaluation_is_as_without_it():
    options = ["MODEL.SASA.ACTIVATION_CHECKPOINTING", "True"]
    backbone = build_backbone(load_config(str(CONFIGS / "demo.yaml"), options)).eval()
    plain = build_backbone(load_config(str(CONFIGS / "demo.yaml"))).eval()
    plain.load_state_dict(backbone.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert isinstance(backbone.bottom_up.res2, nn.Sequential)
    assert torch.equal(backbone(image)["p3"], plain(image)["p3"])
