"""relu(residual + projection), where a bottleneck ends."""

import pytest
import torch
import torch.nn.functional as F

from sasa_det.ops import available_backends, residual_projection, use_backend
from sasa_det.ops.calls import ResidualCall
from sasa_det.ops.native import residual as native_kernel

OPERATOR = torch.ops.sasa_det.residual_projection
EPSILON = torch.finfo(torch.float32).eps
LAYOUTS = [torch.contiguous_format, torch.channels_last]
native = pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")


def make_inputs(shape, out_channels, *, bias=True, layout=torch.channels_last):
    n, in_channels, height, width = shape
    x, residual = torch.randn(shape), torch.randn(n, out_channels, height, width)
    x, residual = (t.contiguous(memory_format=layout) for t in (x, residual))
    weight = torch.randn(out_channels, in_channels, 1, 1)
    return residual, x, weight, torch.randn(out_channels) if bias else None


# Channels that fill vectors and panels and such that do not, in one group and in several.
SHAPES = [
    ((2, 64, 9, 13), 256),
    ((1, 3, 1, 1), 1),
    ((1, 17, 5, 7), 50),
    ((1, 300, 3, 90), 1000),
    ((1, 2048, 2, 3), 49),
    ((0, 8, 4, 4), 16),
]


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_computes_the_formula():
    with use_backend("native"):
        for shape, out_channels in SHAPES:
            assert_it_is_the_formula(make_inputs(shape, out_channels))


@pytest.mark.parametrize(("shape", "out_channels"), SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_the_formula(shape, out_channels, bias, layout):
    inputs = make_inputs(shape, out_channels, bias=bias, layout=layout)
    before = [None if t is None else t.clone() for t in inputs]
    output = assert_it_is_the_formula(inputs)
    assert output.is_contiguous(memory_format=layout)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(inputs, before))


def assert_it_is_the_formula(inputs):
    residual, x, weight, bias = (None if t is None else t.double() for t in inputs)
    with torch.no_grad():
        output = residual_projection(*inputs)
    wanted = F.relu(residual + F.conv2d(x, weight, bias))
    # Each of the terms of a sum is rounded, and so is each sum on the way.
    terms = F.conv2d(x.abs(), weight.abs(), bias if bias is None else bias.abs()) + residual.abs()
    assert ((output - wanted).abs() <= 4 * EPSILON * x.shape[1] ** 0.5 * terms).all()
    return output


@native
def test_the_native_kernel_computes_the_same_twice():
    inputs = make_inputs((1, 8, 5, 6), 24)
    assert native_kernel.refuses(ResidualCall(*inputs)) is None
    with torch.no_grad():
        assert torch.equal(OPERATOR(*inputs), OPERATOR(*inputs))


def test_whatever_kernel_there_is_the_operator_keeps_its_promises():
    """Of shape, format and dtype, which a compiler counts on."""
    inputs = make_inputs((1, 8, 5, 6), 24)
    contiguous = (inputs[0].contiguous(), *inputs[1:])
    double = tuple(t.double() for t in inputs)
    if available_backends()["native"] is None:
        for others, reason in ((contiguous, "in channels_last"), (double, "in float32")):
            assert reason in native_kernel.refuses(ResidualCall(*others))
    with torch.no_grad():
        for call in (inputs, contiguous, double):
            torch.library.opcheck(OPERATOR.default, call)
            assert_it_is_the_formula(call)


def test_shapes_that_do_not_fit_are_an_error():
    residual, x, weight, _ = make_inputs((1, 8, 5, 6), 24)
    with torch.no_grad():
        for channels in (4, 0):
            with pytest.raises(RuntimeError):
                residual_projection(residual, x[:, :channels], weight)
        with pytest.raises(RuntimeError):
            residual_projection(residual[:, :5], x, weight)


@native
def test_what_is_not_a_number_stays_so_and_infinities_are_kept():
    residual, x, weight, bias = make_inputs((1, 8, 4, 4), 19)
    residual[0, 0, 0, 0], residual[0, 18, 1, 1] = float("nan"), float("nan")
    residual[0, 1, 0, 0], residual[0, 18, 2, 2] = float("inf"), -float("inf")
    with torch.no_grad():
        output = residual_projection(residual, x, weight, bias)
    assert output.isnan().sum() == 2
    assert output[0, 1, 0, 0] == float("inf")
    assert output[0, 18, 2, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_and_other_dtypes_take_the_formulas_own_way(dtype):
    inputs = [t.to(dtype).requires_grad_() for t in make_inputs((2, 6, 5, 4), 10)]
    output = residual_projection(*inputs)
    wanted = F.relu(inputs[0] + F.conv2d(*inputs[1:]))
    assert torch.equal(output, wanted)
    assert all(g is not None for g in torch.autograd.grad(output.sum(), inputs))
    with torch.no_grad(), use_backend("eager"):
        assert torch.equal(residual_projection(*inputs), wanted)
