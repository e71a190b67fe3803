"""The Triton kernels of the stem."""

import pytest
import torch
from test_stem_attention import make_inputs as make_stem_inputs
from with_triton import DEVICE, TOLERANCE, UNAVAILABLE, backend, on_device  # noqa: F401

from sasa_det.ops import stem_attention_pooled
from sasa_det.ops.reference import stem_attention_reference
from sasa_det.ops.triton import stem

# N, H, W, C_in, C, heads, mixtures, block
STEM_SHAPES = [
    (2, 8, 22, 3, 16, 2, 4, 4),  # six blocks across, the last of them over the border
    (1, 5, 6, 3, 8, 2, 4, 4),  # blocks reach over both borders
    (2, 1, 1, 3, 4, 1, 2, 4),
    (1, 6, 4, 1, 4, 2, 3, 2),
    (1, 6, 7, 2, 12, 1, 2, 3),
    (1, 4, 6, 3, 22, 1, 2, 4),  # more channels a head than a thread holds
]


def pooled_reference(*inputs, num_heads):
    output = stem_attention_reference(*inputs, num_heads=num_heads)
    block = inputs[4].shape[-1]
    maximum = torch.nn.functional.max_pool2d(output, block, ceil_mode=True)
    return maximum, output.sum(dim=(0, 2, 3)), output.square().sum(dim=(0, 2, 3))


def check_pooled(shape, dtype, *, relative=True, change=lambda image: image):
    inputs, heads = make_stem_inputs(shape, dtype, relative=relative, requires_grad=False)
    (image, *inputs), leaves = on_device(inputs)
    exact, exact_leaves = on_device([x if x is None else x.double() for x in (image, *inputs)])
    outputs = stem_attention_pooled(change(image.detach()), *inputs, num_heads=heads)
    expected = pooled_reference(*exact, num_heads=heads)
    torch.manual_seed(1)
    grads_in = [torch.randn_like(x) for x in outputs]
    grads = torch.autograd.grad(outputs, leaves[1:], grads_in)
    exact_grads_in = [x.double() for x in grads_in]
    expected_grads = torch.autograd.grad(expected, exact_leaves[1:], exact_grads_in)
    for actual, wanted in zip((*outputs, *grads), (*expected, *expected_grads)):
        error = (actual.double() - wanted).norm()
        assert error <= TOLERANCE[dtype] * wanted.norm().clamp_min(1.0)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", STEM_SHAPES, ids=str)
def test_pooled_stem_equals_the_reference_and_so_do_its_gradients(shape, dtype):
    check_pooled(shape, dtype)


@pytest.mark.usefixtures("backend")
def test_pooled_stem_by_content_only_and_with_channels_last():
    def channels_last(image):
        return image.to(memory_format=torch.channels_last)

    check_pooled(STEM_SHAPES[1], torch.float32, relative=False, change=channels_last)


@pytest.mark.usefixtures("backend")
def test_pooled_stem_when_programs_have_many_tiles(monkeypatch):
    monkeypatch.setattr(stem, "_SUMMING_PROGRAMS", 1)
    check_pooled((1, 9, 45, 3, 4, 1, 2, 4), torch.float32)


@pytest.mark.usefixtures("backend")
def test_pooled_stem_of_an_empty_batch():
    inputs, heads = make_stem_inputs(STEM_SHAPES[1], torch.float32, requires_grad=False)
    (image, *inputs), leaves = on_device(inputs)
    maximum, total, square_total = stem_attention_pooled(
        image.detach()[:0], *inputs, num_heads=heads
    )
    assert maximum.shape == (0, 8, 2, 2)
    assert not total.any()
    grads = torch.autograd.grad(maximum.sum() + square_total.sum(), leaves[1:])
    assert not any(x.any() for x in grads)
