"""The Triton kernels of a detector's heads: group norm, and all levels of an FPN at once."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_triton import at_an_odd_place
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from with_triton import DEVICE, TOLERANCE, UNAVAILABLE, backend, on_device  # noqa: F401

from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.ops import (
    group_norm_relu,
    normed_attention,
    pack_levels,
    unpack_levels,
    use_backend,
)
from sasa_det.ops.calls import AttentionCall, GroupNormCall
from sasa_det.ops.triton import attention, group_norm

NORM_SHAPES = [
    (2, 64, 5, 7, 32),
    (1, 256, 40, 21, 32),  # chunks of an image, of more than one tile each
    (2, 96, 9, 3, 32),  # groups of three channels
    (3, 8, 30, 17, 2),
    (2, 64, 1, 1, 4),
    (0, 64, 3, 3, 32),
]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_group_norm_and_relu(shape, dtype, monkeypatch):
    monkeypatch.setattr(group_norm, "_MAX_CHUNKS", 5)
    *size, groups = shape
    x = 2 * torch.randn(size) + 30  # the mean is large
    inputs, leaves = on_device([x.to(dtype), torch.randn(size[1]), torch.randn(size[1])])
    exact, exact_leaves = on_device([x.double() for x in inputs])
    x = inputs[0].to(memory_format=torch.channels_last)
    output = group_norm_relu(x, groups, *inputs[1:], 1e-5)
    expected = F.group_norm(exact[0], groups, *exact[1:], 1e-5).relu()
    grad = torch.randn(size).to(output)
    grads = torch.autograd.grad(output, leaves, grad)
    expected_grads = torch.autograd.grad(expected, exact_leaves, grad.double())
    for actual, wanted in zip((output, *grads), (expected, *expected_grads)):
        error = (actual.double() - wanted).norm()
        assert error <= TOLERANCE[dtype] * wanted.norm().clamp_min(1.0)
    assert output.dtype == dtype
    assert output.stride() == x.stride()
    with torch.no_grad():
        call = GroupNormCall(x, *inputs[1:], None, groups, 1e-5)
        _, statistics = group_norm.forward(call)
        again, _ = group_norm.forward(call._replace(statistics=statistics))
    assert (again - output).norm() <= 0.1 * TOLERANCE[dtype] * output.norm()


@pytest.mark.usefixtures("backend")
def test_a_number_that_is_none_stays_one_behind_the_relu():
    x = torch.randn(1, 64, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
    x[0, 5, 1, 1] = float("nan")
    weight = torch.ones(64, device=DEVICE)
    expected = F.group_norm(x, 32, weight, weight).relu()
    assert torch.equal(group_norm_relu(x, 32, weight, weight, 1e-5).isnan(), expected.isnan())


@pytest.mark.usefixtures("backend")
def test_no_kernel_normalises_maps_whose_channels_are_not_last():
    x, weight = torch.randn(1, 64, 3, 3, device=DEVICE), torch.ones(64, device=DEVICE)
    assert group_norm_relu(x, 32, weight, weight, 1e-5) is None


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 2e-2)])
def test_a_layer_behind_a_group_norm_has_the_gradients_of_its_parts(
    monkeypatch, autocast, tolerance
):
    # Which is cuDNN's default for float32.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    attention = LocalSelfAttention2d(64, 64, kernel_size=3)
    layer = PreActivationSelfAttention2d(attention, nn.GroupNorm(32, 64)).to(DEVICE)
    x = torch.randn(1, 64, 4, 5, device=DEVICE)
    grad = torch.randn_like(x)
    results = []
    # Only where channels are last they are one.
    for memory_format in (torch.contiguous_format, torch.channels_last):
        leaves = [x.to(memory_format=memory_format).requires_grad_(), *layer.parameters()]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            output = layer(leaves[0])
        results.append([output, *torch.autograd.grad(output, leaves, grad, retain_graph=True)])
    for actual, wanted in zip(*results):
        assert (actual - wanted).norm() <= tolerance * wanted.norm()
    kept = [t for t in output.grad_fn.saved_tensors if t is not None and t.shape == x.shape]
    assert len(kept) == 2  # the input and what the attention made of it, not what it was given


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("head_dim", [6, 8, 16])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_the_sum_with_a_residual_is_that_of_torch_to_the_last_bit(residual_dtype, head_dim):
    def make(dtype):
        x = torch.randn(2, 4 * head_dim, 5, 9, device=DEVICE).to(dtype)
        return x.to(memory_format=torch.channels_last)

    call = AttentionCall(*(make(torch.bfloat16) for _ in range(3)), None, None, 4, 3)
    residual = make(residual_dtype)
    added_up, logsumexp, output = attention.add_to(residual, call, keep_output=True)
    expected = attention.forward(call)
    assert torch.equal(output, expected[0])
    assert torch.equal(logsumexp, expected[1])
    assert torch.equal(added_up, residual + output)
    for x in (residual, at_an_odd_place(residual)):
        added_up, *_, output = attention.add_to(x, call, keep_output=False)
        assert torch.equal(added_up, residual + expected[0])
        assert output is None


LEVELS = ((5, 9), (3, 5), (2, 3))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("num_heads", "autocast"), [(2, False), (2, True), (8, False), (8, True)])
def test_the_levels_of_an_fpn_come_to_the_same_at_once_as_one_after_the_other(
    monkeypatch, num_heads, autocast
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head = attention_head(num_heads).to(DEVICE)
    features = [torch.randn(1, 64, *level, device=DEVICE) for level in LEVELS]
    features = [x.to(memory_format=torch.channels_last).requires_grad_() for x in features]
    results = []
    for at_once in (True, False):
        if not at_once:
            head.cls_subnet.register_forward_hook(lambda *_: None)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            outputs = [x for maps in head(features) for x in maps]
        names = {type(x.grad_fn).__name__ for x in outputs}
        assert ("ConvolutionBackward0" in names) != at_once  # else they are parts of one output
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(x.shape, generator=generator).to(x) for x in outputs]
        leaves = [*features, *head.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, grads)])
    for actual, wanted in zip(*results):
        assert actual.shape == wanted.shape
        # In bfloat16 the same numbers are added in another order.
        error, scale = (actual - wanted).float().norm(), wanted.float().norm()
        assert error <= (2e-2 if autocast else 1e-5) * scale.clamp_min(1e-3)


@pytest.mark.usefixtures("backend")
def test_of_all_levels_a_head_keeps_its_input_and_what_each_attention_made_of_its_own():
    features = [torch.randn(1, 64, *level, device=DEVICE, requires_grad=True) for level in LEVELS]
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attention_head().to(DEVICE)(features)
    positions = sum(height * width for height, width in LEVELS)
    maps = [x for x in kept.values() if x.shape[1:] == (64, 1, positions)]
    assert len(maps) == 1 + 2 * 2  # two attentions in each of two subnets


def gradients(module, x, whole, call=None):
    """Of a whole head, or of a layer of it; ``call`` calls the module in another way."""
    call = call or module
    outputs = call([x, x]) if whole else call(x)
    loss = sum(y.square().sum() for maps in outputs for y in maps)
    return torch.autograd.grad(loss, [x, *module.parameters()])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("whole", [True, False], ids=["head", "layer"])
def test_a_hook_on_what_is_kept_may_lose_its_format(whole):  # as save_on_cpu(pin_memory=True)
    head = attention_head().to(DEVICE)
    module = head if whole else head.cls_subnet[0]
    x = torch.randn(1, 64, 4, 5, device=DEVICE)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(module, x, whole)
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
        actual = gradients(module, x, whole)
    assert all(torch.equal(*pair) for pair in zip(actual, expected))


@pytest.mark.usefixtures("backend")
def test_the_second_derivative_is_refused_and_not_taken_for_zero():
    module = attention_head().to(DEVICE).cls_subnet[0]
    x = torch.randn(1, 64, 4, 5, device=DEVICE)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@pytest.mark.usefixtures("backend")
def test_forward_mode_is_refused_without_gradients_too():
    module = attention_head().to(DEVICE).cls_subnet[0]
    x = torch.randn(1, 64, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    with forward_ad.dual_level(), torch.no_grad(), pytest.raises(NotImplementedError):
        module(forward_ad.make_dual(x, x))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("whole", [True, False], ids=["head", "layer"])
def test_checkpointed_it_has_the_same_gradients(whole):
    head = attention_head().to(DEVICE)
    module = head if whole else head.cls_subnet[0]
    x = torch.randn(1, 64, 4, 5, device=DEVICE)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    expected = gradients(module, x, whole)
    again = gradients(module, x, whole, partial(checkpoint, module, use_reentrant=False))
    for actual, wanted in zip(again, expected):
        assert torch.equal(actual, wanted)


@pytest.mark.usefixtures("backend")
def test_a_layer_whose_weights_are_narrower_than_its_map():
    layer = PreActivationSelfAttention2d(
        LocalSelfAttention2d(64, 64, kernel_size=3).bfloat16(), nn.GroupNorm(32, 64)
    ).to(DEVICE)
    x = torch.randn(1, 64, 4, 5, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.autocast(DEVICE, torch.bfloat16):
        output = layer(x)
        with use_backend("eager"):
            wanted = layer(x)
    assert output.dtype == wanted.dtype
    assert (output - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.usefixtures("backend")
def test_levels_in_another_precision_than_that_of_autocast_are_packed_as_they_are():
    levels = [torch.randn(1, 64, *level, device=DEVICE).bfloat16() for level in LEVELS]
    with torch.autocast(DEVICE, torch.float16):
        packed, sizes = pack_levels(levels)
    for level, unpacked in zip(levels, unpack_levels(packed, sizes)):
        assert torch.equal(level, unpacked)


@pytest.mark.usefixtures("backend")
def test_no_kernel_reads_parameters_that_do_not_fit_the_map():
    x = torch.randn(1, 64, 3, 3, device=DEVICE).to(memory_format=torch.channels_last)
    weight = torch.ones(128, device=DEVICE)
    for unfit in (weight[:32], weight[::2]):
        assert group_norm_relu(x, 4, unfit, unfit, 1e-5) is None


@pytest.mark.usefixtures("backend")
def test_a_single_level_is_packed_as_well():
    layer = attention_head().cls_subnet[0].to(DEVICE)
    x = torch.randn(1, 64, 5, 4, device=DEVICE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        packed, levels = pack_levels([x])
        (output,) = unpack_levels(normed_attention(packed, [layer.parts()], levels), levels)
        assert torch.allclose(output, layer(x), atol=1e-5)


@pytest.mark.usefixtures("backend")
def test_outputs_may_be_changed_in_place():  # as detectron2 does with the logits
    features = [torch.randn(1, 64, *level, device=DEVICE) for level in LEVELS]
    for logits in attention_head().to(DEVICE)(features)[0]:
        logits.sigmoid_()


def normed_predictor():
    from detectron2.layers import Conv2d

    return Conv2d(64, 18, 1, norm=nn.GroupNorm(2, 18))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("predictor", [lambda: nn.Conv2d(64, 18, 3, padding=1), normed_predictor])
def test_a_head_with_a_module_of_ones_own_goes_from_level_to_level(predictor):
    head = attention_head().to(DEVICE)
    head.cls_score[-1] = predictor().to(DEVICE)
    features = [torch.randn(1, 64, *level, device=DEVICE) for level in LEVELS]
    with torch.no_grad():
        logits, _ = head(features)
        assert torch.equal(logits[0], head.cls_score(head.cls_subnet(features[0])))


def attention_head(num_heads=2):
    from detectron2.layers import ShapeSpec

    from sasa_det.modeling.retinanet import AttentionRetinaNetHead

    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=64)] * len(LEVELS)
    options = {"num_classes": 2, "num_anchors": 9, "conv_dims": [64], "num_heads": num_heads}
    head = AttentionRetinaNetHead(input_shape=shapes, kernel_size=3, **options)
    for parameter in head.parameters():  # none of which is what it starts with
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head
