"""``stem_attention`` is Eq. 3 inside blocks, with values mixed by position."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import StemSelfAttention2d
from sasa_det.ops import stem_attention, stem_attention_pooled
from sasa_det.ops.reference import stem_attention_reference

# N, H, W, C_in, C, heads, mixtures, block
SHAPES = [
    (2, 8, 12, 3, 8, 2, 4, 4),
    (1, 5, 6, 3, 8, 2, 4, 4),  # blocks reach over both borders
    (2, 1, 1, 3, 4, 1, 2, 4),
    (1, 6, 4, 1, 4, 2, 3, 2),
    (1, 132, 140, 3, 4, 2, 4, 4),  # more blocks than one chunk
]


def make_inputs(shape, dtype=torch.float64, *, relative=True, requires_grad=True):
    n, height, width, in_channels, channels, heads, mixtures, block = shape
    torch.manual_seed(0)
    sizes = [(n, in_channels, height, width), (channels, in_channels), (channels, in_channels)]
    sizes += [(mixtures, channels, in_channels), (mixtures, block, block)]
    if relative:
        sizes += [(heads, 2 * block - 1, channels // heads // 2)] * 2
    inputs = [torch.randn(size, dtype=torch.float64) for size in sizes]
    inputs[4] = inputs[4].softmax(dim=0)
    inputs = [x.to(dtype).requires_grad_(requires_grad) for x in inputs]
    return inputs + [None] * (7 - len(inputs)), heads


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_equals_the_reference_and_so_do_its_gradients(shape, relative):
    inputs, heads = make_inputs(shape, relative=relative)
    leaves = [x for x in inputs if x is not None]
    output = stem_attention(*inputs, num_heads=heads)
    expected = stem_attention_reference(*inputs, num_heads=heads)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def pooled_by_hand(inputs, heads):
    """The maximum of each block and the two moments, from the output at full resolution."""
    output = stem_attention_reference(*inputs, num_heads=heads)
    block = inputs[4].shape[-1]
    maximum = F.max_pool2d(output, block, ceil_mode=True)
    return maximum, output.sum(dim=(0, 2, 3)), output.square().sum(dim=(0, 2, 3))


def relative_error(actual, wanted):
    return (actual.double() - wanted).norm() / wanted.norm()


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES[:4], (1, 9, 70, 3, 64, 8, 4, 4)], ids=str)
def test_pooled_it_is_the_maximum_of_each_block_and_two_moments(shape, dtype, relative, backend):
    if backend == "native" and dtype == torch.float64:
        pytest.skip("the native backend computes in float32 and bfloat16")
    inputs, heads = make_inputs(shape, dtype, relative=relative)
    inputs[0].requires_grad_(False)
    leaves = [x for x in inputs[1:] if x is not None]
    exact = [x if x is None else x.detach().double() for x in inputs]
    exact_leaves = [x.requires_grad_() for x in exact[1:] if x is not None]
    outputs = stem_attention_pooled(*inputs, num_heads=heads)
    wanted = pooled_by_hand(exact, heads)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert all(relative_error(a, w) <= bound for a, w in zip(outputs, wanted))
    # Linear and quadratic in the outputs, so that all three are seen in the gradients.
    weights = [torch.randn_like(w) for w in wanted]
    loss = sum((x.double() * w).sum() for x, w in zip(outputs, weights))
    exact_loss = sum((x * w).sum() for x, w in zip(wanted, weights))
    grads = torch.autograd.grad(loss, leaves)
    exact_grads = torch.autograd.grad(exact_loss, exact_leaves)
    # A single position attends to itself alone: what weighs nothing has a gradient of zero.
    largest = max(w.norm() for w in exact_grads)
    for actual, exact_grad in zip(grads, exact_grads):
        error = (actual.double() - exact_grad).norm()
        assert error <= bound * max(exact_grad.norm(), 1e-2 * largest)


def test_pooled_opcheck_and_errors(backend):
    inputs, heads = make_inputs(SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match="computes no gradient of the image"):
        stem_attention_pooled(*inputs, num_heads=heads)
    image = inputs[0].detach()
    torch.library.opcheck(
        torch.ops.sasa_det.stem_attention_pooled.default, (image, *inputs[1:], heads)
    )


def test_an_image_that_needs_no_gradient_gets_none():
    inputs, heads = make_inputs(SHAPES[0])
    wanted = torch.autograd.grad(stem_attention(*inputs, num_heads=heads).sum(), inputs)
    image = inputs[0].detach()
    output = stem_attention(image, *inputs[1:], num_heads=heads)
    for actual, expected in zip(torch.autograd.grad(output.sum(), inputs[1:]), wanted[1:]):
        torch.testing.assert_close(actual, expected)
    torch.library.opcheck(torch.ops.sasa_det.stem_attention.default, (image, *inputs[1:], heads))


def test_chunks_of_blocks_add_up_to_the_whole():
    inputs, heads = make_inputs(SHAPES[4])
    image, *others = inputs
    output = stem_attention(*inputs, num_heads=heads)
    top = stem_attention(image[:, :, :64], *others, num_heads=heads)
    bottom = stem_attention(image[:, :, 64:], *others, num_heads=heads)
    torch.testing.assert_close(output, torch.cat([top, bottom], dim=2))
    grads = torch.autograd.grad(output.sum(), inputs)
    parts = torch.autograd.grad(top.sum() + bottom.sum(), inputs)
    for actual, wanted in zip(grads, parts):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_is_as_close_to_float64_as_its_rounding_allows(dtype):
    inputs, heads = make_inputs(SHAPES[0], dtype, requires_grad=False)
    output = stem_attention(*inputs, num_heads=heads)
    exact = stem_attention_reference(*inputs, num_heads=heads)
    assert output.dtype == dtype
    bound = 64 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    assert (output.double() - exact).abs().max() <= bound * exact.abs().max()


def test_gradcheck_and_opcheck():
    inputs, heads = make_inputs((1, 5, 4, 2, 4, 2, 2, 2))
    assert torch.autograd.gradcheck(
        lambda *x: stem_attention(*x, num_heads=heads), inputs, fast_mode=True
    )
    torch.library.opcheck(torch.ops.sasa_det.stem_attention.default, (*inputs, heads))


def test_a_position_sees_its_own_block_only():
    inputs, heads = make_inputs(SHAPES[0], requires_grad=False)
    changed = inputs[0].clone()
    changed[:, :, :4, :4] += 1.0
    before = stem_attention(*inputs, num_heads=heads)
    after = stem_attention(changed, *inputs[1:], num_heads=heads)
    assert not torch.equal(before[:, :, :4, :4], after[:, :, :4, :4])
    torch.testing.assert_close(before[:, :, 4:], after[:, :, 4:], rtol=0, atol=0)
    torch.testing.assert_close(before[:, :, :, 4:], after[:, :, :, 4:], rtol=0, atol=0)


def test_the_mixture_by_hand():
    # One block of 1x2 pixels, one channel in; queries of zero average the two values. The left
    # pixel is projected by 0.25 * 2 + 0.75 * 10 = 8, the right one by 0.5 * 2 + 0.5 * 10 = 6.
    image = torch.tensor([3.0, 5.0]).view(1, 1, 1, 2)
    zeros = torch.zeros(2, 1)
    value_weights = torch.tensor([2.0, 10.0]).view(2, 1, 1).repeat(1, 2, 1)
    mixture = torch.tensor([[[0.25, 0.5], [0.0, 0.0]], [[0.75, 0.5], [1.0, 1.0]]])
    output = stem_attention(image, zeros, zeros, value_weights, mixture, None, None, num_heads=1)
    assert output[0, 0, 0].tolist() == pytest.approx([(8 * 3 + 6 * 5) / 2] * 2)


def test_the_layers_mixture_follows_its_definition():
    layer = StemSelfAttention2d(3, 8, num_heads=2)
    mixture = layer.mixture()
    torch.testing.assert_close(mixture.sum(dim=0), torch.ones(4, 4))
    position = layer.row_embedding[1] + layer.col_embedding[3]
    expected = (layer.mixture_embedding @ position).softmax(dim=0)
    torch.testing.assert_close(mixture[:, 1, 3], expected)


def test_flops_are_counted_by_torch():
    inputs, heads = make_inputs(SHAPES[0], torch.float32)
    with FlopCounterMode(display=False) as counter:
        stem_attention(*inputs, num_heads=heads).sum().backward()
    assert counter.get_flop_counts()["Global"].keys() == {
        torch.ops.sasa_det.stem_attention,
        torch.ops.sasa_det.stem_attention_backward,
    }


def test_empty_batches_and_autocast():
    inputs, heads = make_inputs(SHAPES[0], torch.float32)
    empty = stem_attention(inputs[0][:0], *inputs[1:], num_heads=heads)
    assert empty.shape == (0, 8, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stem_attention(*inputs, num_heads=heads).dtype == torch.bfloat16


def test_wrong_arguments_are_named():
    inputs, _ = make_inputs(SHAPES[0], torch.float32)
    with pytest.raises(ValueError, match="8 channels do not divide into num_heads=3"):
        stem_attention(*inputs, num_heads=3)
    with pytest.raises(ValueError, match=r"key_weight must have the shape \(8, 3\)"):
        stem_attention(*inputs[:2], torch.zeros(8, 4), *inputs[3:], num_heads=2)
