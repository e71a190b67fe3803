"""Every backend computes the same; one is chosen automatically or by name, and says why not."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from test_local_attention import SHAPES, make_inputs
from torch.utils.flop_counter import FlopCounterMode

import sasa_det.ops
from sasa_det.ops import available_backends, local_attention, projected_attention, use_backend
from sasa_det.ops.backends import allows
from sasa_det.ops.calls import LARGE_BLOCK

# Beside those of the operator's tests: maps of one vector a row to four, whole and with a rest, and
# heads of 8, 12, 32 and 48 channels.
LARGER = [
    (1, 64, 40, 40, 8, 7),
    (2, 64, 20, 20, 2, 7),
    (1, 16, 11, 10, 2, 7),
    (1, 24, 37, 33, 2, 9),
    (1, 8, 9, 50, 1, 13),
    (1, 48, 9, 21, 1, 15),
]
EPSILON = torch.finfo(torch.float32).eps
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def gradients(inputs, options, grad_output):
    leaves = [x.detach().requires_grad_() for x in inputs if x is not None]
    output = local_attention(*leaves, *inputs[len(leaves) :], **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


def assert_equal_to_float64(inputs, options, dtype):
    """Output and gradients, in relative norm; float64 itself is compared with the reference."""
    grad_output = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    grad_output = grad_output.to(dtype)
    actual = gradients(inputs, options, grad_output)
    with use_backend("eager"):
        exact = [x if x is None else x.double() for x in inputs]
        wanted = gradients(exact, options, grad_output.double())
    for a, w in zip(actual, wanted):
        assert a.dtype == dtype
        # Where offsets leave the map from everywhere, the embeddings' gradient is zero.
        assert (a.double() - w).norm() <= BOUNDS[dtype] * max(w.norm(), wanted[0].norm())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES + LARGER, ids=str)
def test_every_backend_is_close_to_float64(shape, dtype, relative, layout, backend):
    inputs, options = make_inputs(shape, dtype, relative=relative)
    inputs[:3] = [x.to(memory_format=layout) for x in inputs[:3]]
    assert_equal_to_float64(inputs, options, dtype)


@pytest.mark.usefixtures("instruction_set")
def test_every_instruction_set_computes_the_same():
    with use_backend("native"):
        for shape in SHAPES + LARGER:
            for layout in (torch.contiguous_format, torch.channels_last):
                inputs, options = make_inputs(shape, torch.float32)
                inputs[:3] = [x.to(memory_format=layout) for x in inputs[:3]]
                assert_equal_to_float64(inputs, options, torch.float32)


@pytest.mark.parametrize("shape", [SHAPES[1], LARGER[0]], ids=str)
def test_logits_of_ten_thousand_make_no_nan(shape, backend):
    inputs, options = make_inputs(shape, torch.float32)
    query, key, *others = inputs
    largest = (query.abs().sum(dim=1) * key.abs().max()).max()
    scale = (1e4 / largest).sqrt() * 10
    for result in gradients([query * scale, key * scale, *others], options, inputs[0]):
        assert result.isfinite().all()


@pytest.mark.parametrize("shape", [SHAPES[0], LARGER[0]], ids=str)
def test_two_runs_are_the_same_to_the_bit(shape, backend):
    inputs, options = make_inputs(shape, torch.float32)
    for first, second in zip(*(gradients(inputs, options, inputs[0]) for _ in range(2))):
        assert torch.equal(first, second)


@pytest.mark.parametrize("width", [32, 24, 8], ids=lambda width: f"width {width}")
def test_bands_of_one_head_add_up_to_the_whole(width, monkeypatch):
    if available_backends()["native"] is not None:
        pytest.skip("bands are the native backend's")
    inputs, options = make_inputs((1, 8, 64, width, 1, 5), torch.float32)
    with use_backend("native"):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
        whole = gradients(inputs, options, inputs[0])
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        for actual, wanted in zip(gradients(inputs, options, inputs[0]), whole):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)


def test_several_threads_may_call_at_once(backend):
    cases = [make_inputs(shape, torch.float32, seed=i) for i, shape in enumerate(SHAPES[:4] * 4)]
    wanted = [local_attention(*inputs, **options) for inputs, options in cases]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda case: local_attention(*case[0], **case[1]), cases)
        assert all(torch.equal(a, w) for a, w in zip(results, wanted))


@pytest.mark.parametrize("groups", [1, 2], ids=["whole", "by groups of heads"])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
def test_projecting_anew_changes_no_gradient(relative, biased, groups, backend, monkeypatch):
    (x, *_, rows, cols), options = make_inputs(
        (2, 8, 9, 14, 4, 5), torch.float32, relative=relative
    )
    bias = torch.randn(24) if biased else None
    inputs = [x, torch.randn(24, 8, 1, 1) * 8**-0.5, bias, rows, cols]
    leaves = [t.requires_grad_() for t in inputs if t is not None]

    def separately(x, weight, bias, rows, cols):
        maps = torch.nn.functional.conv2d(x, weight, bias).chunk(3, dim=1)
        return local_attention(*maps, rows, cols, **options)

    # The bytes of a group's queries, keys and values; x has as many numbers as each of them.
    monkeypatch.setattr("sasa_det.ops.steps.LARGE_BLOCK", 3 * 4 * x.numel() // groups)
    output = projected_attention(x, inputs[1], rows, cols, bias=bias, **options)
    expected = separately(*inputs)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(output)
    for actual, wanted in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    ):
        assert (actual - wanted).norm() <= BOUNDS[torch.float32] * wanted.norm()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_where_no_kernel_projects_the_operator_goes_by_steps(layout, biased, groups, monkeypatch):
    (x, *_, rows, cols), options = make_inputs((2, 8, 9, 14, 4, 5), torch.float32)
    x = x.contiguous(memory_format=layout)
    weight = (torch.randn(24, 8, 1, 1) * 8**-0.5).to(memory_format=torch.channels_last)
    bias, residual = torch.randn(24) if biased else None, torch.randn(x.shape)
    leaves = [x, weight, bias, rows, cols]
    doubles = [None if t is None else t.double().requires_grad_() for t in leaves]
    wanted = projected_attention(
        *doubles[:2], *doubles[3:], bias=doubles[2], residual=residual.double(), **options
    )
    grad = torch.randn(x.shape)
    needed = [t for t in doubles if t is not None]
    wanted_grads = torch.autograd.grad(wanted, needed, grad.double())

    monkeypatch.setattr("sasa_det.ops.steps.LARGE_BLOCK", 3 * 4 * x.numel() // groups)
    operators = torch.ops.sasa_det
    arguments = (*leaves, residual, None, None, *options.values())
    with torch.no_grad(), use_backend("eager"):
        output, logsumexp = operators.projected_attention(*arguments)
        backward = (grad, logsumexp, True, True, *arguments)
        results = output, *operators.projected_attention_backward(*backward)
        torch.library.opcheck(operators.projected_attention.default, arguments)
        torch.library.opcheck(operators.projected_attention_backward.default, backward)
        half = [t.bfloat16() if isinstance(t, torch.Tensor) else t for t in arguments]
        torch.library.opcheck(operators.projected_attention.default, half)
    assert all(t.is_contiguous(memory_format=layout) for t in results[:2])
    for actual, w in zip(results, (wanted, *wanted_grads), strict=True):
        assert (actual - w).norm() <= BOUNDS[torch.float32] * w.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("bands", [1, 2])
@pytest.mark.parametrize(
    "shape",
    # As SHAPES: several vectors, several panels and pieces of channels, maps smaller than a window.
    [(2, 24, 9, 37, 4, 5), (1, 320, 11, 18, 4, 3), (1, 16, 13, 5, 2, 7), (2, 8, 3, 2, 1, 9)],
    ids=str,
)
@pytest.mark.usefixtures("instruction_set")
def test_projecting_row_by_row_changes_nothing(shape, bands, layout, monkeypatch):
    n, channels, height, width, heads, size = shape
    g = torch.Generator().manual_seed(0)
    in_channels = channels + 3
    x = torch.randn(n, in_channels, height, width, generator=g)
    x = x.contiguous(memory_format=layout)
    weight = torch.randn(3 * channels, in_channels, 1, 1, generator=g) * in_channels**-0.5
    bias = torch.randn(3 * channels, generator=g)
    for queries in (weight[:channels], bias[:channels]):
        queries *= (channels // heads) ** -0.5  # logits of about unit variance
    rows, cols = torch.randn(2, heads, size, channels // heads // 2, generator=g)
    grad, residual = torch.randn(2, n, channels, height, width, generator=g)
    tensors = [t.requires_grad_() for t in (x, weight, bias, rows, cols, residual)]

    def run(tensors):
        x, weight, bias, rows, cols, residual = tensors
        options = {"bias": bias, "residual": residual, "num_heads": heads, "kernel_size": size}
        output = projected_attention(x, weight, rows, cols, **options)
        return output, *torch.autograd.grad(output, tensors, grad.to(x.dtype))

    with use_backend("eager"):
        expected = run([t.detach().double().requires_grad_() for t in tensors])
    monkeypatch.setattr("sasa_det.ops.native.projected.number_of_bands", lambda *_: 1)
    monkeypatch.setattr("sasa_det.ops.native.attention.number_of_bands", lambda *_: bands)
    with use_backend("native"), FlopCounterMode(display=False) as counter:
        actual = run(tensors)
    operator = torch.ops.sasa_det.projected_attention
    assert operator in counter.get_flop_counts()["Global"]
    assert all(t.is_contiguous(memory_format=layout) for t in actual[:2])
    for a, e in zip(actual, expected):
        assert (a - e).norm() <= BOUNDS[torch.float32] * e.norm()
    assert all(torch.equal(a, b) for a, b in zip(run(tensors), actual))
    with torch.no_grad():
        for affine in ((None, None), torch.randn(2, channels, generator=g)):
            torch.library.opcheck(operator.default, (*tensors, *affine, heads, size))


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x[:1, ..., :1],
        lambda x: x[:1, ..., :1, :],
        lambda x: x[:1, ..., :1, :5],
        lambda x: x[:1, ..., :1, :].transpose(2, 3),
        lambda x: x[:1, ..., :1].transpose(2, 3),
        lambda x: x[..., 1:-1, 1:-1],
        lambda x: x[:, :, ::2, ::2],
        lambda x: x.flip(1)[:, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x[:1].expand(2, -1, -1, -1),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_a_map_with_any_strides_are_those_of_a_dense_one(strided, layout, backend):
    (whole, *_, rows, cols), options = make_inputs((2, 16, 9, 8, 2, 3), torch.float32)
    x = strided(whole.to(memory_format=layout)).detach()
    weight = torch.randn(48, x.shape[1], 1, 1) * 4**-0.5

    def gradients_of(x):
        leaves = [t.requires_grad_() for t in (x, weight, rows, cols)]
        output = projected_attention(*leaves, **options)
        return torch.autograd.grad(output.square().sum(), leaves)

    for actual, wanted in zip(gradients_of(x), gradients_of(x.clone().contiguous())):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")
@pytest.mark.parametrize(("height", "row_by_row"), [(42, True), (41, False)])
def test_many_threads_project_row_by_row_where_few_rows_are_computed_twice(
    height, row_by_row, monkeypatch
):
    (x, *_, rows, cols), options = make_inputs((1, 16, height, 3, 8, 7), torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)  # two bands of each of eight heads
    with use_backend("native"), FlopCounterMode(display=False) as counter:
        projected_attention(x, torch.randn(48, 16, 1, 1), rows, cols, **options)
    operators = counter.get_flop_counts()["Global"]
    assert (torch.ops.sasa_det.projected_attention in operators) == row_by_row
    assert (torch.ops.sasa_det.local_attention in operators) != row_by_row


@pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")
def test_what_needs_no_gradient_is_not_differentiated():
    (x, *_, rows, cols), options = make_inputs((1, 16, 9, 8, 2, 3), torch.float32)
    weight = torch.randn(48, 16, 1, 1) * 4**-0.5
    product = 2 * weight.numel() * 9 * 8
    flops = {}
    for needed in ((0, 1, 2, 3), (0, 2, 3), (1, 2, 3), (2, 3)):
        leaves = [
            t.detach().requires_grad_(i in needed) for i, t in enumerate((x, weight, rows, cols))
        ]
        with use_backend("native"):
            output = projected_attention(*leaves, **options)
            with FlopCounterMode(display=False) as counter:
                grads = torch.autograd.grad(output.square().sum(), [leaves[i] for i in needed])
        flops[needed] = counter.get_total_flops()
        if len(needed) == 4:
            everything = dict(zip(needed, grads))
        assert all(torch.equal(grad, everything[i]) for i, grad in zip(needed, grads))
    assert flops[0, 1, 2, 3] - flops[0, 2, 3] == product
    assert flops[0, 1, 2, 3] - flops[1, 2, 3] == product
    assert flops[0, 1, 2, 3] - flops[2, 3] == 2 * product


@pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")
@pytest.mark.parametrize("input_gradient", [True, False], ids=["all", "of parameters alone"])
def test_gradients_do_not_depend_on_the_number_of_threads(input_gradient, monkeypatch):
    (x, *_, rows, cols), options = make_inputs((2, 24, 30, 21, 6, 5), torch.float32)
    weight = torch.randn(72, 24, 1, 1) * 24**-0.5
    leaves = [t.requires_grad_() for t in (x, weight, rows, cols)]
    x.requires_grad_(input_gradient)
    monkeypatch.setattr("sasa_det.ops.native.projected.number_of_bands", lambda *_: 1)
    monkeypatch.setattr("sasa_det.ops.native.attention.number_of_bands", lambda *_: 1)

    def run(threads):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        with use_backend("native"):
            output = projected_attention(x, weight, rows, cols, **options)
            return torch.autograd.grad(output.square().sum(), leaves[not input_gradient :])

    alone = run(1)
    for threads in (2, 5, 12) * 5:  # more than there are processors: they wait for each other
        assert all(map(torch.equal, run(threads), alone))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_added_and_scaled_costs_no_more_than_its_rounding(layout, gradients, backend):
    (x, *_, rows, cols), options = make_inputs((2, 8, 9, 14, 4, 5), torch.float32)
    weight = torch.randn(24, 8, 1, 1) * 8**-0.5
    scale, shift = torch.randn(2, 8)
    affine = {"output_scale": scale, "output_shift": shift}
    with torch.set_grad_enabled(gradients):
        output = projected_attention(x, weight, rows, cols, **options)
        for residual in (None, x, torch.randn(x.shape).contiguous(memory_format=layout)):
            added = torch.zeros(()) if residual is None else residual
            total = projected_attention(x, weight, rows, cols, residual=residual, **options)
            bound = 2 * EPSILON * (output.abs() + added.abs())
            assert ((total - (output + added)).abs() <= bound).all()
            scaled = projected_attention(
                x, weight, rows, cols, residual=residual, **affine, **options
            )
            wanted = total * scale[:, None, None] + shift[:, None, None]
            bound = bound * scale.abs()[:, None, None] + 2 * EPSILON * (
                (total * scale[:, None, None]).abs() + shift.abs()[:, None, None]
            )
            assert ((scaled - wanted).abs() <= bound).all()


def test_a_scale_without_a_shift_is_refused():
    (x, *_, rows, cols), options = make_inputs((1, 8, 4, 5, 2, 3), torch.float32)
    with pytest.raises(ValueError, match="output_shift must be given together"):
        projected_attention(
            x, torch.randn(24, 8, 1, 1), rows, cols, output_scale=torch.ones(8), **options
        )


def test_a_block_that_is_mapped_anew_is_computed_like_any_other(backend):
    shape = (1, 16, 1024, 512)
    inputs, options = make_inputs((1, 16, 12, 512, 2, 3), torch.float32)
    maps = [torch.cat([x, x.new_zeros(1, 16, shape[2] - 12, 512)], dim=2) for x in inputs[:3]]
    assert maps[0].nbytes >= LARGE_BLOCK
    output = local_attention(*maps, *inputs[3:], **options)
    assert torch.equal(output[:, :, :11], local_attention(*inputs, **options)[:, :, :11])


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or available_backends()["native"] is not None,
    reason="other processors are as fast with denormal numbers",
)
def test_denormal_numbers_are_zeros_inside_the_kernels_and_numbers_outside():
    heads, kernel_size = 1, 3
    query, key, value = torch.randn(3, 1, 4, 6, 6)
    query[:], key[:] = 5, 5
    key[:, :, 2, 2] = -5  # a logit of -100 beside those of 100: nobody attends to it
    leaves = [t.requires_grad_() for t in (query, key, value)]
    with use_backend("native"):
        output = local_attention(*leaves, None, None, num_heads=heads, kernel_size=kernel_size)
    for grad in torch.autograd.grad(output.square().sum(), leaves):
        assert not ((grad != 0) & (grad.abs() < torch.finfo(torch.float32).tiny)).any()
    assert torch.tensor(1e-30) * torch.tensor(1e-10) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 7}, r"rel_rows must have the shape \(2, 7, 2\)"),
        ({"rel_cols": None}, "must be given together"),
        ({"num_heads": 3}, "8 channels do not divide into num_heads=3"),
        ({"num_heads": 0}, "8 channels do not divide into num_heads=0"),
        ({"weight": torch.zeros(25, 8, 1, 1)}, r"weight must have the shape \(3 \* C, 8, 1, 1\)"),
        ({"weight": torch.zeros(24, 8, 3, 3)}, r"weight must have the shape \(3 \* C, 8, 1, 1\)"),
        ({"x": torch.zeros(8, 6, 6)}, r"x must be \(N, C, H, W\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_do_not_reach_the_kernels(change, message):
    arguments = {"x": torch.zeros(1, 8, 6, 6), "weight": torch.zeros(24, 8, 1, 1)}
    arguments |= {name: torch.zeros(2, 5, 2) for name in ("rel_rows", "rel_cols")}
    arguments |= {"num_heads": 2, "kernel_size": 5, **change}
    arguments["x"].requires_grad_()
    with pytest.raises(ValueError, match=message):
        projected_attention(**arguments)


# Choosing.


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_where_there_is_a_compiler_there_are_kernels():
    assert available_backends()["native"] is None


def test_the_eager_backend_is_everywhere():
    assert available_backends()["eager"] is None


def test_threads_may_leave_the_backends_that_they_asked_for_in_any_order():
    first, second = use_backend("eager"), use_backend("native")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert allows("native")
    assert not allows("eager")
    second.__exit__(None, None, None)
    assert allows("eager")


def test_a_forced_backend_that_cannot_serve_says_why():
    inputs, options = make_inputs(SHAPES[0])
    message = r"'native' was asked for but does not serve this call of local_attention: .*float64"
    with use_backend("native"), pytest.raises(RuntimeError, match=message):
        local_attention(*inputs, **options)
    local_attention(*inputs, **options)  # automatically, another one does


def test_a_backend_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match=r"no backend 'cudnn'; choose one of .*'eager'"):
        use_backend("cudnn").__enter__()


def run_python(code, path=ROOT, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=path, capture_output=True, text=True, env={**os.environ, **environment}
    )


CALL = """
import torch
from torch.utils.flop_counter import FlopCounterMode
from sasa_det.ops import local_attention
x = torch.ones(1, 4, 5, 5)
print(local_attention(x, x, x, None, None, num_heads=1, kernel_size=3).sum().item())
local_attention(x, x, x, None, None, num_heads=1, kernel_size=3)
"""


def test_the_environment_variable_names_a_backend():
    assert run_python(CALL, SASA_DET_BACKEND="eager").stdout == "100.0\n"
    run = run_python(CALL, SASA_DET_BACKEND="none")
    assert "There is no backend 'none'" in run.stderr


def test_without_compiled_kernels_it_works_and_says_so_once(tmp_path):
    package = os.path.dirname(os.path.dirname(sasa_det.ops.__file__))
    shutil.copytree(package, tmp_path / "sasa_det", ignore=shutil.ignore_patterns("*.so"))
    run = run_python(CALL, tmp_path, PYTHONPATH=str(tmp_path))
    assert run.stdout == "100.0\n"
    assert run.stderr.count("attention runs on the slower eager path") == 1
