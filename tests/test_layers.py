"""The layers: shapes, initialisation, what they refuse; they import torch and nothing else."""

import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d, StemSelfAttention2d
from sasa_det.layers.local_attention import NormReLU, sinusoidal_encodings
from sasa_det.ops import use_backend
from sasa_det.ops.functional import shared_casts


@pytest.mark.parametrize("position", ["relative", "absolute", "none"])
def test_local_attention_keeps_the_resolution(position):
    layer = LocalSelfAttention2d(8, 16, kernel_size=5, num_heads=4, position=position)
    assert layer(torch.randn(2, 8, 7, 1)).shape == (2, 16, 7, 1)


def test_absolute_positions_are_sinusoids_of_the_row_and_the_column():
    encodings = sinusoidal_encodings(torch.zeros(3, 8, 5, 6))
    assert encodings.shape == (1, 8, 5, 6)
    for i, j in [(0, 0), (2, 5), (4, 1)]:
        row = [math.sin(i), math.sin(i / 100), math.cos(i), math.cos(i / 100)]
        col = [math.sin(j), math.sin(j / 100), math.cos(j), math.cos(j / 100)]
        torch.testing.assert_close(encodings[0, :, i, j], torch.tensor(row + col))


def test_absolute_positions_are_added_to_the_content_and_nothing_is_learned_of_them():
    layer = LocalSelfAttention2d(16, 16, kernel_size=3, num_heads=2, position="absolute")
    by_content = LocalSelfAttention2d(16, 16, kernel_size=3, num_heads=2, position="none")
    by_content.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 6, 7)
    x_there = x + sinusoidal_encodings(x)
    torch.testing.assert_close(layer(x), by_content(x_there))
    torch.testing.assert_close(layer.attention_weights(x), by_content.attention_weights(x_there))
    assert layer(torch.ones(1, 16, 6, 7)).std(dim=(2, 3)).min() > 0.01  # it sees where it is
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_projections_are_full_and_without_bias_and_embeddings_belong_to_heads():
    layer = LocalSelfAttention2d(64, 128, kernel_size=7, num_heads=8)
    embeddings = 2 * 8 * 7 * (128 // 8 // 2)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 64 * 128 + embeddings


def test_logits_of_a_normalised_input_start_at_unit_variance():
    torch.manual_seed(0)
    layer = LocalSelfAttention2d(256, 256, position="none")
    query, key, value = layer.projection(torch.randn(4, 256, 16, 16)).chunk(3, dim=1)
    logits = (query * key).unflatten(1, (8, 32)).sum(dim=2)
    assert logits.std().item() == pytest.approx(1, rel=0.1)
    assert value.std().item() == pytest.approx(1, rel=0.1)


def test_pre_activation_attention_starts_from_its_input_whatever_the_scale():
    torch.manual_seed(0)
    attention = LocalSelfAttention2d(32, 32, num_heads=4)
    layer = PreActivationSelfAttention2d(attention, torch.nn.GroupNorm(8, 32))
    x = torch.randn(1, 32, 9, 9)
    torch.testing.assert_close(layer(100 * x) - 100 * x, layer(x) - x, rtol=1e-3, atol=1e-3)


def test_attention_weights_of_the_layer_sum_to_one():
    layer = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2)
    weights = layer.attention_weights(torch.randn(1, 8, 5, 6))
    assert weights.shape == (1, 2, 9, 5, 6)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(1, 2, 5, 6))


def test_stem_clips_blocks_at_the_border():
    layer = StemSelfAttention2d(3, 16, num_heads=2)
    x = torch.randn(1, 3, 10, 7)
    assert layer(x).shape == (1, 16, 10, 7)
    torch.testing.assert_close(layer(x)[:, :, :8, :4], layer(x[:, :, :8, :4]))


def test_plain_values_of_the_stem_are_a_mixture_of_equals():
    plain = StemSelfAttention2d(3, 16, num_heads=2, num_mixtures=1)
    mixed = StemSelfAttention2d(3, 16, num_heads=2)
    names = {name for name, _ in plain.named_parameters()}
    assert names == {"query_key_weight", "value_weights", "rel_rows", "rel_cols"}
    assert plain.value_weights.shape == (1, 16, 3)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            getattr(mixed, name).copy_(parameter)
    x, sign = torch.randn(2, 3, 9, 8), torch.ones(16)
    torch.testing.assert_close(plain(x), mixed(x))
    for actual, wanted in zip(plain.pooled(x, sign), mixed.pooled(x, sign)):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_the_stem_has_no_absolute_positions():
    with pytest.raises(ValueError, match=r"3 channels of an image.*choose the convolutional stem"):
        StemSelfAttention2d(position="absolute")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out_channels": 30}, "30 channels do not divide into num_heads=8"),
        ({"out_channels": 24}, "head_dim must be even"),
        ({"kernel_size": 6}, "kernel_size must be odd.*choose 5 or 7"),
        ({"position": "learned"}, "position must be one of relative, absolute, none, but is"),
        ({"position": "absolute", "in_channels": 6}, "need channels divisible by 4.* there are 6"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        LocalSelfAttention2d(**{"in_channels": 32, "out_channels": 32, **options})


WITHOUT_DETECTRON2 = """
import importlib.abc, sys, warnings

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"detectron2", "fvcore", "torchvision", "pycocotools"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sasa_det.layers, sasa_det.ops, torch
print(*(str(w.message) for w in caught if "detectron2" in str(w.message)), sep="|")
print(sasa_det.layers.LocalSelfAttention2d(8, 8, num_heads=2)(torch.zeros(1, 8, 3, 3)).shape)
try:
    sasa_det.add_sasa_config
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("position", ["relative", "absolute"])
def test_the_layer_compiles_and_keeps_no_queries_keys_and_values(position):
    layer = LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=2, position=position)
    x = torch.randn(1, 16, 14, 13, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = layer(x)
    parameters = sum(p.numel() for p in layer.parameters())
    assert sum(t.numel() for t in saved) <= 1.2 * x.numel() + parameters
    wanted = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    actual = torch.autograd.grad(compiled.square().sum(), [x, *layer.parameters()])
    for a, w in zip(actual, wanted):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)


def test_the_layer_compiles_under_autocast():
    layer, x = LocalSelfAttention2d(16, 16, kernel_size=3, num_heads=2), torch.randn(1, 16, 5, 4)
    gradients = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        with torch.autocast("cpu", torch.bfloat16):
            output = module(x)
        gradients.append(torch.autograd.grad(output.float().sum(), list(layer.parameters())))
    for actual, wanted in zip(*gradients):
        assert (actual - wanted).norm() <= 2e-2 * wanted.norm()


def test_absolute_positions_are_exported_for_any_size():
    layer = LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=2, position="absolute")
    size = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (torch.randn(2, 16, 9, 8),), dynamic_shapes=(size,))
    x = torch.randn(2, 16, 12, 10)
    torch.testing.assert_close(program.module()(x), layer(x))


def pre_activation_layer(attention=None):
    attention = attention or LocalSelfAttention2d(32, 32, kernel_size=5, num_heads=2)
    return PreActivationSelfAttention2d(attention, torch.nn.GroupNorm(4, 32))


def test_a_group_norms_output_is_not_kept_and_the_gradients_are_those_of_the_formula(monkeypatch):
    layer = pre_activation_layer()
    torch.nn.init.normal_(layer.norm.weight)
    x = torch.randn(2, 32, 14, 13, requires_grad=True)
    normed = []

    def group_norm(*arguments):
        output = plain_group_norm(*arguments)
        normed.append(StorageWeakRef(output.untyped_storage()))
        return output

    plain_group_norm = F.group_norm
    monkeypatch.setattr(F, "group_norm", group_norm)
    output = layer(x)
    assert normed[0].expired()
    wanted = x + layer.attention(torch.relu(layer.norm(x)))
    grad = torch.randn_like(x)
    leaves = [x, *layer.parameters()]
    for actual, expected in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(wanted, leaves, grad)
    ):
        torch.testing.assert_close(actual, expected)


def test_a_norm_is_computed_again_with_the_weights_of_the_forward():
    layer, other = pre_activation_layer(), pre_activation_layer()
    for parameter in other.norm.parameters():
        torch.nn.init.normal_(parameter)
    x, weights = torch.randn(2, 32, 6, 5), dict(other.named_parameters())
    outputs = (torch.func.functional_call(layer, weights, (x,)), other(x))
    gradients = [torch.autograd.grad(y.square().sum(), list(weights.values())) for y in outputs]
    torch.testing.assert_close(*gradients)


def test_what_is_changed_in_place_before_the_backward_is_noticed():
    layer = pre_activation_layer()
    output = layer(torch.randn(2, 32, 6, 5))
    with torch.no_grad():
        layer.attention.projection.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    x = torch.randn(2, 32, 6, 5)
    output = layer(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_frozen_norm_needs_its_input_no_more():
    layer, x = pre_activation_layer(), torch.randn(2, 32, 6, 5)
    layer.norm.requires_grad_(False)
    weight = layer.attention.projection.weight
    (wanted,) = torch.autograd.grad(layer(x).square().sum(), weight)
    output = layer(x)
    loss = output.square().sum()
    x.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, weight), (wanted,))


def test_a_pre_activation_layer_is_traced_with_and_without_gradients():
    layer, x = pre_activation_layer(), torch.randn(2, 32, 6, 5)
    torch.testing.assert_close(torch.jit.trace(layer, x)(x), layer(x))


class Transposing(torch.nn.Module):
    """Keeps a view of its input that has the same address and shape."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(32, 6, 6))

    def forward(self, x):
        return (x.mT * self.weight).mT


def test_a_view_of_a_norms_output_is_not_taken_for_it():
    layer, x = pre_activation_layer(Transposing()), torch.randn(2, 32, 6, 6)
    wanted = x + layer.attention(torch.relu(layer.norm(x)))
    gradients = [torch.autograd.grad(y.sum(), layer.attention.weight) for y in (layer(x), wanted)]
    torch.testing.assert_close(*gradients)


def test_a_graph_without_a_backward_is_freed():
    attention = LocalSelfAttention2d(32, 32, kernel_size=5, num_heads=2)
    layer = pre_activation_layer(torch.nn.Sequential(attention, torch.nn.Sigmoid()))
    kept = []
    layer.attention[1].register_forward_hook(
        lambda module, inputs, output: kept.append(StorageWeakRef(output.untyped_storage()))
    )
    layer(torch.randn(2, 32, 6, 5))
    assert kept[0].expired()


def test_other_modules_may_take_the_place_of_norm_activation_and_projection():
    x = torch.randn(2, 32, 6, 5)
    activation = NormReLU(torch.nn.GroupNorm(4, 32))
    activation[1] = torch.nn.Tanh()
    torch.testing.assert_close(activation(x), torch.tanh(activation[0](x)))
    attention = LocalSelfAttention2d(32, 32, kernel_size=5, num_heads=2)
    grouped = torch.nn.Conv2d(32, 96, kernel_size=1, groups=4, bias=False)
    full = attention.projection.weight
    full.data.zero_()
    for group in range(4):
        rows = slice(24 * group, 24 * (group + 1))
        full.data[rows, 8 * group : 8 * (group + 1)] = grouped.weight.data[rows]
    wanted = attention(x)
    attention.projection = grouped
    torch.testing.assert_close(attention(x), wanted)


def test_a_norm_is_computed_again_in_the_precision_of_the_forward():
    layer = pre_activation_layer()
    x = torch.randn(2, 32, 14, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
        wanted = x + layer.attention(torch.relu(layer.norm(x)))
    weight = layer.norm.weight
    actual, expected = (torch.autograd.grad(y.float().sum(), weight)[0] for y in (output, wanted))
    torch.testing.assert_close(actual, expected)


def test_the_backward_serves_after_the_backend_was_changed():
    layer = LocalSelfAttention2d(32, 32, kernel_size=5, num_heads=4)
    x = torch.randn(1, 32, 9, 8)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.projection.weight)[0]
    output = layer(x).square().sum()
    with use_backend("eager"):
        actual = torch.autograd.grad(output, layer.projection.weight)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_frozen_projection_and_a_backward_under_autocast():
    layer = LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=2)
    layer.projection.requires_grad_(False)
    output = layer(torch.randn(1, 16, 14, 13))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output.sum().backward()
    assert layer.projection.weight.grad is None
    assert layer.rel_rows.grad.abs().sum() > 0


def test_hooks_on_the_projection_are_called():
    layer = LocalSelfAttention2d(16, 16, kernel_size=5, num_heads=2)
    x = torch.randn(1, 16, 8, 9)
    expected = layer(x)
    layer.projection.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert (layer(x) - expected).abs().max() > 0.1


def test_without_detectron2_the_operator_works_and_one_sentence_says_what_to_install():
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_DETECTRON2], capture_output=True, text=True, check=True
    )
    warning, shape, error = run.stdout.splitlines()
    assert warning.count("install detectron2") == 1
    assert "|" not in warning
    assert shape == "torch.Size([1, 8, 3, 3])"
    assert "install detectron2" in error


def test_casts_of_parameters_are_shared_where_a_layer_is_called_more_than_once():
    layer = LocalSelfAttention2d(16, 16, kernel_size=3)
    maps = [torch.randn(1, 16, size, size) for size in (4, 5)]

    def gradients():
        with torch.autocast("cpu", dtype=torch.bfloat16), shared_casts():
            with torch.no_grad():
                layer(maps[0])  # whose casts have no gradient
            with CountCalls() as casts:
                outputs = [layer(x) for x in maps]
        loss = sum(output.float().square().sum() for output in outputs)
        return torch.autograd.grad(loss, list(layer.parameters())), casts

    grads, casts = gradients()
    assert (
        casts["aten._to_copy.default"] == 2 + 1
    )  # the maps and the weight: embeddings stay float32
    expected = [layer(x).square().sum() for x in maps]
    expected = torch.autograd.grad(sum(expected), list(layer.parameters()))
    for actual, wanted in zip(grads, expected):
        assert actual.dtype == torch.float32
        assert (actual - wanted).norm() < 0.03 * wanted.norm()
    with torch.no_grad():
        layer.projection.weight.zero_()
    assert not any(x.any() for x in gradients()[0][1:])  # nothing is remembered


class CountCalls(TorchDispatchMode):
    def __enter__(self):
        super().__enter__()
        self.counts = Counter()
        return self.counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))
