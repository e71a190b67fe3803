"""The Triton kernels of the attention, and how kernels are launched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_local_attention import make_inputs
from with_triton import DEVICE, TOLERANCE, UNAVAILABLE, backend, on_device  # noqa: F401

from sasa_det.ops import local_attention, use_backend
from sasa_det.ops.calls import AttentionCall
from sasa_det.ops.reference import local_attention_reference
from sasa_det.ops.triton import attention
from sasa_det.ops.triton.launch import Launch

# N, C, H, W, heads, kernel_size
SHAPES = [
    (2, 8, 5, 9, 2, 3),
    (1, 6, 9, 10, 1, 7),  # head_dim 6; tiles reach over both borders
    (1, 32, 6, 5, 1, 7),  # head_dim 32; the window is larger than the map
    (1, 4, 1, 20, 2, 3),  # head_dim 2
    (1, 8, 17, 1, 1, 9),
    (2, 8, 1, 1, 2, 7),
    (1, 16, 5, 19, 1, 11),
    (1, 4, 3, 18, 1, 17),
    (2, 4, 6, 5, 2, 1),
    (1, 64, 5, 10, 8, 7),  # head_dim 8, as the first layers of a ResNet have it
    (1, 24, 5, 9, 3, 5),  # as many heads as do not fit a power of two
]
NARROW, WIDE = (1, 8, 5, 9, 2, 3), (1, 12, 5, 9, 2, 3)  # two sets of kernels


@pytest.mark.skipif(not UNAVAILABLE, reason="the tests run as they are")
def test_in_the_interpreter():
    # Triton reads the variable once, when it is imported.
    pytest.importorskip("triton")
    files = sorted(Path(__file__).parent.glob("test_triton*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def check(inputs, options, *, change=lambda maps: maps, tolerance=None):
    """Output and gradients against the reference; ``change`` lays out the maps in another way."""
    inputs, leaves = on_device(inputs)
    exact, exact_leaves = on_device([x if x is None else x.double() for x in inputs])
    tolerance = tolerance or TOLERANCE[inputs[0].dtype]
    output = local_attention(*change(inputs[:3]), *inputs[3:], **options)
    expected = local_attention_reference(*exact, **options)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    grads = torch.autograd.grad(output, leaves, grad)
    expected_grads = torch.autograd.grad(expected, exact_leaves, grad.double())
    for actual, wanted in zip((output, *grads), (expected, *expected_grads)):
        assert actual.dtype == inputs[0].dtype
        error = (actual.double() - wanted).norm()
        # Windows of a single position have gradients of zero.
        assert error <= tolerance * wanted.norm().clamp_min(1.0)
    return output


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_and_so_do_its_gradients(shape):
    check(*make_inputs(shape, torch.float32))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6], SHAPES[9]], ids=str)
def test_attends_by_content_only(shape):
    check(*make_inputs(shape, torch.float32, relative=False))


@pytest.mark.usefixtures("backend")
def test_embeddings_in_float32_beside_half_precision():
    inputs, options = make_inputs(SHAPES[1], torch.bfloat16)
    inputs, _ = on_device(inputs)
    wide = [*inputs[:3], *(x.detach().float().requires_grad_() for x in inputs[3:])]
    output, expected = (local_attention(*x, **options) for x in (wide, inputs))
    assert torch.equal(output, expected)
    grads = torch.autograd.grad(output.sum(), wide)
    for actual, wanted in zip(grads, torch.autograd.grad(expected.sum(), inputs)):
        assert torch.equal(actual.to(wanted.dtype), wanted)
    assert [x.dtype for x in grads] == [x.dtype for x in wide]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[6], SHAPES[9]], ids=str)
def test_half_precision(shape, dtype):
    (query, *others), options = make_inputs(shape, dtype)
    # Logits of unit variance, as a layer starts with: weights are rounded for the tensor cores, and
    # the sharper the softmax, the more of that is seen.
    head_dim = query.shape[1] // options["num_heads"]
    check([query * head_dim**-0.5, *others], options)


def channels_last(maps):
    return [x.to(memory_format=torch.channels_last) for x in maps]


def slices_of_one_projection(maps):
    return torch.cat(maps, dim=1).chunk(3, dim=1)


def slices_with_channels_last(maps):
    fused = torch.cat(maps, dim=1).to(memory_format=torch.channels_last)
    return fused.chunk(3, dim=1)


def three_layouts(maps):
    query, key, value = maps
    return [query, *channels_last([key]), value.mT.contiguous().mT]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
@pytest.mark.parametrize(
    "change", [channels_last, slices_of_one_projection, slices_with_channels_last, three_layouts]
)
def test_any_strides(change, shape):
    inputs, options = make_inputs(shape, torch.float32)
    output = check(inputs, options, change=change)
    assert output.stride() == torch.empty_like(change(inputs[:3])[0]).stride()


def at_an_odd_place(x):
    """The same map in channels_last, the second number of its storage the first of the map."""
    n, channels, height, width = x.shape
    storage = torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])
    return storage[1:].view(n, height, width, channels).permute(0, 3, 1, 2)


# The kernels for narrow heads read two numbers of bfloat16 at once.
@pytest.mark.parametrize("channels", [7, 8])
def test_maps_of_half_precision_are_read_from_even_places(channels):
    x = at_an_odd_place(torch.randn(2, channels, 3, 5).bfloat16())
    read = attention._channels_last(x)
    assert torch.equal(read, x)
    assert read.data_ptr() % 4 == 0


@pytest.mark.usefixtures("backend")
def test_half_precision_from_odd_places_on():
    (query, *others), options = make_inputs(NARROW, torch.bfloat16)

    def odd(maps):
        return [at_an_odd_place(x) for x in maps]

    check([0.5 * query, *others], options, change=odd)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(2, 8, 4, 5, 2, 3), (2, 12, 4, 5, 2, 3)], ids=str)
@pytest.mark.parametrize("expanded", ["query", "value", "images"])
def test_maps_that_are_expanded_are_read_as_what_they_stand_for(expanded, shape):
    inputs, options = make_inputs(shape, torch.float32)
    query, key, value = slices_with_channels_last([x.to(DEVICE) for x in inputs[:3]])
    if expanded == "query":  # one that is learned
        query = query[:1, :, :1, :1].expand_as(query)
    elif expanded == "value":
        value = value[:, :, :1, :1].expand_as(value)
    else:
        query = query[:1].expand_as(query)
    check([query, key, value, *inputs[3:]], options, change=list)


@pytest.mark.usefixtures("backend")
def test_keys_and_values_of_two_layouts_of_one_column():
    inputs, options = make_inputs((2, 8, 5, 1, 2, 3), torch.float32)
    query, key, value = (x.to(DEVICE) for x in inputs[:3])
    key, _, _ = slices_with_channels_last([key, value, value])
    value = value.flatten(2).mT.contiguous().mT.unsqueeze(3)
    check([query, key, value, *inputs[3:]], options, change=list)


@pytest.mark.usefixtures("backend")
def test_strides_of_a_dimension_with_one_entry_do_not_matter():
    inputs, options = make_inputs((2, 8, 9, 1, 2, 3), torch.float32)

    def tokens(maps):  # (N, positions, C) as a map of one column
        return [x.flatten(2).mT.contiguous().mT.unsqueeze(3) for x in maps]

    check(inputs, options, change=tokens)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [(1, 4, 5, 9, 1, 3), (1, 6, 5, 9, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_ten_thousands_are_no_problem(dtype, shape):
    inputs, options = make_inputs(shape, dtype)
    large = [100 * inputs[0], 100 * inputs[1], *inputs[2:]]
    # Neither is the map's border, where a chunk of keys may hold nothing that a query sees.
    on, leaves = on_device(large)
    output = local_attention(*on, **options)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(x.isfinite().all() for x in (output, *grads))
    expected = local_attention_reference(*large, **options)
    assert (output.cpu().double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("shape", [NARROW, WIDE], ids=str)
def test_the_same_twice(shape):
    inputs, options = make_inputs(shape, torch.float32)
    inputs, leaves = on_device(inputs)

    def run():
        output = local_attention(*inputs, **options)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    assert all(torch.equal(first, second) for first, second in zip(run(), run()))


@pytest.mark.usefixtures("backend")
def test_empty_batches():
    inputs, options = make_inputs((1, 8, 5, 9, 2, 3), torch.float32)
    inputs, leaves = on_device([*(x[:0] for x in inputs[:3]), *inputs[3:]])
    output = local_attention(*inputs, **options)
    assert output.shape == (0, 8, 5, 9)
    for grad, x in zip(torch.autograd.grad(output.sum(), leaves), leaves):
        assert grad.shape == x.shape
        assert not grad.any()


def test_what_is_refused_is_named():
    inputs, options = make_inputs((1, 8, 4, 4, 2, 19), torch.float32)
    call = AttentionCall(*(x.to("meta") for x in inputs), **options)
    assert attention.refuses(call) == "it does not serve tensors on meta"
    if UNAVAILABLE:
        with use_backend("triton"), pytest.raises(RuntimeError, match="tensors on cpu"):
            local_attention(*inputs, **options)
    else:
        with use_backend("triton"), pytest.raises(RuntimeError, match="kernel_size=19"):
            local_attention(*(x.to(DEVICE) for x in inputs), **options)
        with use_backend("triton"), pytest.raises(RuntimeError, match=r"torch\.float64"):
            local_attention(*(x.to(DEVICE).double() for x in inputs), **options)


@pytest.mark.usefixtures("backend")
def test_images_are_refused_whose_gradients_would_overflow_an_index():
    x = torch.empty(1, device=DEVICE).expand(1, 256, 1700, 1700)
    call = AttentionCall(x, x, x, None, None, num_heads=8, kernel_size=7)
    assert "2 ** 31" in attention.refuses(call)


class FakeKernel:
    """What ``triton.jit`` makes, as far as a launch uses it."""

    arg_names = ("x", "stride", "SIZE")

    def __init__(self):
        self.compiled_for, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_launch(*arguments, **options):
            self.compiled_for.append((*arguments, options))
            return self

        def launch(*arguments):
            self.launched.append((grid, *arguments))

        return launch if len(grid) > 3 else compile_and_launch


def test_a_launch_like_an_earlier_one_takes_the_kernel_that_was_compiled_for_it():
    kernel, x = FakeKernel(), torch.zeros(8)

    def launch(x, stride=3, size=4, num_warps=2):
        # In another order than the kernel has them.
        arguments, constants = {"stride": stride, "x": x}, {"SIZE": size}
        Launch(kernel, (5, 6), arguments, constants, {"num_warps": num_warps}).run()

    launch(x)
    assert kernel.compiled_for == [(x, 3, 4, {"num_warps": 2})]
    others = torch.ones(8), torch.full((8,), 2.0)
    for other in others:
        launch(other)
    assert kernel.launched == [((5, 6, 1, 1), other, 3, 4) for other in others]
    # A pointer that is not aligned, and all else that Triton compiles for.
    for change in ({"x": x[1:]}, {"x": x.half()}, {"stride": 1}, {"size": 8}, {"num_warps": 4}):
        launch(**({"x": x} | change))
    assert len(kernel.compiled_for) == 6
    assert len(kernel.launched) == 2


WITHOUT_TRITON = """
import sys
from pathlib import Path
sys.modules["triton"] = None  # importing it fails
from sasa_det.ops import available_backends
assert available_backends()["triton"] == "triton is not installed"
"""


def test_triton_need_not_be_installed():
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON], check=True, cwd=ROOT)
