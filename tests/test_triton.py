"""The Triton kernels: on CUDA, or else in Triton's interpreter; and compiled for a GPU anyway."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_local_attention import make_inputs
from test_stem_attention import make_inputs as make_stem_inputs
from torch import nn

from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.ops import (
    available_backends,
    group_norm_relu,
    local_attention,
    stem_attention_pooled,
    use_backend,
)
from sasa_det.ops.calls import AttentionCall, GroupNormCall, StemCall
from sasa_det.ops.eager_stem import Stem
from sasa_det.ops.reference import local_attention_reference, stem_attention_reference
from sasa_det.ops.registration import group_norm_relu_op
from sasa_det.ops.triton import attention, group_norm, stem
from sasa_det.ops.triton.launch import Launch, interpreted

UNAVAILABLE = available_backends()["triton"]
DEVICE = "cpu" if interpreted() else "cuda"
# Relative to the norm of the exact result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
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
]


@pytest.fixture
def backend():
    if UNAVAILABLE:
        pytest.skip("without CUDA these run in the subprocess of test_in_the_interpreter")
    with use_backend("triton"):
        yield


@pytest.mark.skipif(not UNAVAILABLE, reason="the tests run as they are")
def test_in_the_interpreter():
    # Triton reads the variable once, when it is imported.
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout


def on_device(inputs):
    tensors = [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in inputs]
    return tensors, [x for x in tensors if x is not None]


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
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[6]], ids=str)
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
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2], SHAPES[6]], ids=str)
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
@pytest.mark.parametrize(
    "change", [channels_last, slices_of_one_projection, slices_with_channels_last, three_layouts]
)
def test_any_strides(change):
    inputs, options = make_inputs((1, 8, 5, 9, 2, 3), torch.float32)
    output = check(inputs, options, change=change)
    assert output.stride() == torch.empty_like(change(inputs[:3])[0]).stride()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_ten_thousands_are_no_problem(dtype):
    inputs, options = make_inputs((1, 4, 5, 9, 1, 3), dtype)
    large = [100 * inputs[0], 100 * inputs[1], *inputs[2:]]
    # Neither is the map's border, where a chunk of keys may hold nothing that a query sees.
    on, leaves = on_device(large)
    output = local_attention(*on, **options)
    grads = torch.autograd.grad(output, leaves, torch.ones_like(output))
    assert all(x.isfinite().all() for x in (output, *grads))
    expected = local_attention_reference(*large, **options)
    assert (output.cpu().double() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.usefixtures("backend")
def test_the_same_twice():
    inputs, options = make_inputs((1, 8, 5, 9, 2, 3), torch.float32)
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


# N, C, H, W, groups
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
        _, statistics = group_norm_relu_op(x, *inputs[1:], None, groups, 1e-5)
        again, _ = group_norm_relu_op(x, *inputs[1:], statistics, groups, 1e-5)
    assert (again - output).norm() <= 0.1 * TOLERANCE[dtype] * output.norm()


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


LEVELS = ((5, 9), (3, 5), (2, 3))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("autocast", [False, True])
def test_the_levels_of_an_fpn_come_to_the_same_at_once_as_one_after_the_other(
    monkeypatch, autocast
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head = attention_head().to(DEVICE)
    features = [torch.randn(1, 64, *level, device=DEVICE) for level in LEVELS]
    features = [x.to(memory_format=torch.channels_last).requires_grad_() for x in features]
    results = []
    for at_once in (True, False):
        if not at_once:
            head.register_forward_hook(lambda *_: None)
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
def test_a_head_with_a_module_of_ones_own_goes_from_level_to_level():
    head = attention_head().to(DEVICE)
    head.cls_score = nn.Conv2d(64, 18, 3, padding=1).to(DEVICE)
    features = [torch.randn(1, 64, *level, device=DEVICE) for level in LEVELS]
    with torch.no_grad():
        logits, _ = head(features)
        x = head.cls_subnet(features[0])
        assert torch.equal(logits[0], head.cls_score(x))


def attention_head():
    from detectron2.layers import ShapeSpec

    from sasa_det.modeling.retinanet import AttentionRetinaNetHead

    torch.manual_seed(0)
    shapes = [ShapeSpec(channels=64)] * len(LEVELS)
    options = {"num_classes": 2, "num_anchors": 9, "conv_dims": [64], "num_heads": 2}
    head = AttentionRetinaNetHead(input_shape=shapes, kernel_size=3, **options)
    for parameter in head.parameters():  # none of which is what it starts with
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head


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
sys.modules["triton"] = None  # importing it fails
from sasa_det.ops import available_backends
assert available_backends()["triton"] == "triton is not installed"
"""


def test_triton_need_not_be_installed():
    subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_TRITON], check=True, cwd=ROOT)


def compile_for_hopper(launch):
    """What the compiler makes of a launch for sm_90; it needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    types[torch.int32] = "*i32"
    constants, attributes = {}, {}

    def type_of(x, path, specialize=True):
        """As ``triton.jit`` specialises what a kernel is called with."""
        if isinstance(x, tuple):
            return tuple(type_of(item, (*path, i)) for i, item in enumerate(x))
        if isinstance(x, float):
            return "fp32"
        if x is None or (specialize and isinstance(x, int) and x == 1):
            constants[path] = x
            return "constexpr"
        if isinstance(x, torch.Tensor) or (specialize and x % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return types[x.dtype] if isinstance(x, torch.Tensor) else "i32"

    signature = {}
    for i, param in enumerate(launch.kernel.params):
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constants[i,] = launch.constants[param.name]
        else:
            x = launch.arguments[param.name]
            signature[param.name] = type_of(x, (i,), not param.do_not_specialize)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options)


def attention_launches(dtype, head_dim, kernel_size, relative=True, levels=None):
    heads, height, width = 4, 20, 30
    channels = heads * head_dim
    fused = torch.empty(2, 3 * channels, height, width, dtype=dtype, device="meta")
    maps = fused.to(memory_format=torch.channels_last).chunk(3, dim=1)
    embedding = None
    if relative:
        embedding = torch.empty(heads, kernel_size, head_dim // 2, dtype=dtype, device="meta")
    call = AttentionCall(*maps, embedding, embedding, heads, kernel_size, levels)
    grad = torch.empty_like(call.query)
    logsumexp = torch.empty(2, heads, height, width, device="meta")
    partial_sums = attention.new_partial_sums(call)
    launches = [
        attention.forward_launch(call, grad, logsumexp),
        attention.query_gradient_launch(call, grad, grad, logsumexp, grad, logsumexp, partial_sums),
        attention.key_value_gradient_launch(call, grad, logsumexp, logsumexp, grad, grad),
    ]
    if relative:
        sums = (partial_sums, embedding, embedding)
        launches.append(attention.embedding_gradient_launch(call, *sums))
    return launches


def stem_launches(dtype, in_channels=3):
    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    heads, channels, embeddings = 8, 64, empty(8, 7, 4)
    call = StemCall(
        empty(2, in_channels, 64, 96),
        empty(channels, in_channels),
        empty(channels, in_channels),
        empty(4, channels, in_channels),
        empty(4, 4, 4),
        embeddings,
        embeddings,
        heads,
    )
    parameters, maximum = Stem(call), empty(2, channels, 16, 24)
    partial_sums = stem.new_partial_sums(call, 1)
    sums = empty(channels, dtype=torch.float32)
    return [
        stem.forward_launch(call, parameters, maximum, partial_sums),
        stem.backward_launch(call, parameters, (maximum, sums, sums), [partial_sums] * 3),
    ]


COMPILED = [
    (torch.bfloat16, 32, 7, True, None),
    (torch.float16, 32, 7, True, ((15, 30), (10, 15))),
    (torch.float32, 32, 7, True, None),
    (torch.bfloat16, 64, 11, True, None),
    (torch.float16, 2, 3, True, None),
    (torch.bfloat16, 6, 1, False, None),
    (torch.bfloat16, 16, 17, True, ((15, 30), (10, 15))),
]


# The interpreter accepts what the compiler does not.
@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(("dtype", "head_dim", "kernel_size", "relative", "levels"), COMPILED)
def test_compiles_for_a_gpu(dtype, head_dim, kernel_size, relative, levels):
    pytest.importorskip("triton")
    for launch in attention_launches(dtype, head_dim, kernel_size, relative, levels):
        kernel = compile_for_hopper(launch)
        has_products = "PRECISION" in launch.constants
        assert ("mma" in kernel.asm["ptx"]) == (has_products and dtype != torch.float32)
        assert kernel.metadata.shared < 48 * 1024  # what every GPU has


@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(("dtype", "in_channels"), [(torch.bfloat16, 3), (torch.float32, 1)])
def test_pooled_stem_compiles_for_a_gpu(dtype, in_channels):
    pytest.importorskip("triton")
    for launch in stem_launches(dtype, in_channels):
        assert compile_for_hopper(launch).metadata.shared < 48 * 1024


def group_norm_launches(dtype, channels, groups, levels):
    x = torch.empty(2, channels, 80, 80, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last)
    weight = torch.empty(channels, device="meta")
    call = GroupNormCall(x, weight, weight, None, groups, 1e-5, levels)
    chunks = group_norm.new_statistics(call, group_norm.num_chunks(call))
    of_maps = group_norm.new_statistics(call, 2)
    known = call._replace(statistics=of_maps)
    return [
        group_norm.statistics_launch(call, chunks),
        group_norm.forward_launch(call, chunks, x, of_maps),
        group_norm.forward_launch(known, of_maps, x, of_maps),
        group_norm.gradient_sums_launch(known, x, chunks, chunks),
        group_norm.input_gradient_launch(known, x, chunks, x),
    ]


@pytest.mark.skipif(interpreted(), reason="nothing is compiled for the interpreter")
@pytest.mark.parametrize(
    ("dtype", "channels", "groups", "levels"),
    [
        (torch.bfloat16, 256, 32, None),
        (torch.float32, 256, 32, None),
        (torch.bfloat16, 96, 32, ((70, 80), (20, 40))),
    ],
)
def test_group_norm_compiles_for_a_gpu(dtype, channels, groups, levels):
    pytest.importorskip("triton")
    for launch in group_norm_launches(dtype, channels, groups, levels):
        kernel = compile_for_hopper(launch)
        assert kernel.metadata.shared < 48 * 1024
        if channels == 256:  # the channels of a group are next to each other
            assert "ld.global.v4" in kernel.asm["ptx"]
