"""``local_attention`` is Eq. 3 of the paper, for every shape, dtype, layout, and its gradients."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.ops import local_attention, local_attention_weights
from sasa_det.ops.reference import local_attention_reference

# N, C, H, W, heads, kernel_size
SHAPES = [
    (2, 8, 6, 9, 2, 3),
    (1, 16, 14, 13, 2, 7),  # too large for the dense path
    (2, 8, 3, 20, 4, 7),  # H smaller than the window
    (1, 8, 17, 2, 1, 5),  # W smaller than the window
    (3, 8, 1, 1, 2, 7),
    (1, 4, 1, 30, 2, 3),
    (1, 4, 160, 1, 1, 9),
    (1, 12, 5, 5, 3, 11),  # the window larger than the map, all around
    (2, 4, 13, 12, 2, 1),  # the window is the position itself
]


def make_inputs(shape, dtype=torch.float64, *, relative=True, seed=0, requires_grad=False):
    n, channels, height, width, heads, kernel_size = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        tensor = torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)
        return tensor.requires_grad_(requires_grad)

    maps = [draw(n, channels, height, width) for _ in range(3)]
    embeddings = [None, None]
    if relative:
        embeddings = [draw(heads, kernel_size, channels // heads // 2) for _ in range(2)]
    return [*maps, *embeddings], {"num_heads": heads, "kernel_size": kernel_size}


def tolerance(dtype, depth):
    """Rounding of ``depth`` additions in the computation's dtype, and of the result in its own."""
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return 4 * (depth * compute + torch.finfo(dtype).eps)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_and_so_do_its_gradients(shape, relative):
    inputs, options = make_inputs(shape, relative=relative, requires_grad=True)
    leaves = [x for x in inputs if x is not None]
    output = local_attention(*inputs, **options)
    expected = local_attention_reference(*inputs, **options)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, leaves, grad)
    expected_grads = torch.autograd.grad(expected, leaves, grad)
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_every_dtype_is_as_close_to_float64_as_its_rounding_allows(shape, dtype, backend):
    if backend == "native" and dtype == torch.float16:
        pytest.skip("the native backend computes in float32 and bfloat16")
    inputs, options = make_inputs(shape, dtype, requires_grad=True)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    output = local_attention(*inputs, **options)
    exact = local_attention_reference(*exact_inputs, **options)
    assert output.dtype == dtype
    depth = options["kernel_size"] ** 2 + shape[1] // shape[4]
    scale = exact.abs().max()
    assert (output.double() - exact).abs().max() <= tolerance(dtype, depth) * scale
    grad = torch.randn_like(output)
    grads = torch.autograd.grad(output, inputs, grad)
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.double())
    for actual, wanted in zip(grads, exact_grads):
        assert actual.dtype == dtype
        # Embedding gradients add up over all positions.
        bound = tolerance(dtype, depth + shape[0] * shape[2] * shape[3]) * wanted.abs().max()
        assert (actual.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("shape", [(1, 4, 3, 4, 2, 3), (1, 4, 13, 12, 1, 3)], ids=["dense", "walk"])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
def test_gradcheck(shape, relative):
    inputs, options = make_inputs(shape, relative=relative, requires_grad=True)
    leaves = [x for x in inputs if x is not None]

    def call(*leaves):
        return local_attention(*(leaves if relative else (*leaves, None, None)), **options)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "content"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:2], ids=["dense", "walk"])
def test_opcheck(shape, relative, layout, backend):
    inputs, options = make_inputs(shape, torch.float32, relative=relative)
    maps = [x.to(memory_format=layout).requires_grad_() for x in inputs[:3]]
    arguments = (*maps, *inputs[3:], options["num_heads"], options["kernel_size"])
    torch.library.opcheck(torch.ops.sasa_det.local_attention.default, arguments)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=["dense", "walk"])
def test_memory_format_changes_nothing_and_is_kept(shape, backend):
    inputs, options = make_inputs(shape, torch.float32)
    expected = local_attention(*inputs, **options)
    maps = [x.to(memory_format=torch.channels_last) for x in inputs[:3]]
    output = local_attention(*maps, *inputs[3:], **options)
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_slices_of_one_projection_need_not_be_contiguous(backend):
    (query, key, value, *embeddings), options = make_inputs(SHAPES[1], torch.float32)
    expected = local_attention(query, key, value, *embeddings, **options)
    fused = torch.cat([query, key, value], dim=1).repeat(2, 1, 1, 1)
    output = local_attention(*fused.chunk(3, dim=1), *embeddings, **options)
    torch.testing.assert_close(output[:1], expected)
    transposed = [x.transpose(2, 3) for x in (query, key, value)]
    copies = [x.contiguous() for x in transposed]
    torch.testing.assert_close(
        local_attention(*transposed, *embeddings, **options),
        local_attention(*copies, *embeddings, **options),
    )


@pytest.mark.parametrize("shape", SHAPES[:2], ids=["dense", "walk"])
def test_torch_compile_and_export_see_one_node(shape, backend):
    inputs, options = make_inputs(shape, torch.float32, requires_grad=True)

    def call(*inputs):
        return local_attention(*inputs, **options).square()

    expected = torch.autograd.grad(call(*inputs).sum(), inputs)
    # Inductor holds the fake implementation to its strides, but needs a compiler.
    compiler = "inductor" if shutil.which("c++") else "aot_eager"
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    output = compiled(*inputs)
    torch.testing.assert_close(output, call(*inputs))
    for actual, wanted in zip(torch.autograd.grad(output.sum(), inputs), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    program = torch.export.export(Module(), tuple(x.detach() for x in inputs))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    attention = [target for target in targets if "sasa_det" in str(target)]
    assert attention == [torch.ops.sasa_det.local_attention.default]


def test_meta_tensors_and_empty_batches_have_shapes(backend):
    inputs, options = make_inputs(SHAPES[1], torch.float32)
    assert local_attention(*(x.to("meta") for x in inputs), **options).shape == SHAPES[1][:4]
    empty = [x[:0].requires_grad_() for x in inputs[:3]]
    output = local_attention(*empty, *inputs[3:], **options)
    assert output.shape == (0, *SHAPES[1][1:4])
    output.sum().backward()
    assert empty[0].grad.shape == output.shape


def test_autocast_computes_in_the_autocast_dtype():
    inputs, options = make_inputs(SHAPES[0], torch.float32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = local_attention(*inputs, **options)
        weights = local_attention_weights(*inputs[:2], *inputs[3:], **options)
    assert weights.shape[2] == 9
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_embeddings_may_be_float32_beside_half_precision(backend):
    inputs, options = make_inputs(SHAPES[1], torch.bfloat16, requires_grad=True)
    wide = [*inputs[:3], *(x.detach().float().requires_grad_() for x in inputs[3:])]
    output, expected = (local_attention(*x, **options) for x in (wide, inputs))
    assert torch.equal(output, expected)
    grads, expected_grads = (
        torch.autograd.grad(y.sum(), x) for y, x in ((output, wide), (expected, inputs))
    )
    assert [x.dtype for x in grads] == [x.dtype for x in wide]
    for actual, wanted in zip(grads, expected_grads):
        torch.testing.assert_close(actual.to(wanted.dtype), wanted)


def test_autocast_does_not_reach_into_the_operator(backend):
    inputs, options = make_inputs(SHAPES[0], torch.bfloat16)
    expected = local_attention(*inputs, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(local_attention(*inputs, **options), expected)


def test_flops_are_counted_by_torch():
    n, channels, height, width, _, kernel_size = SHAPES[1]
    inputs, options = make_inputs(SHAPES[1], torch.float32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        output = local_attention(*inputs, **options)
    # q . k, the sum of the values, and q . r factorised into k rows and k columns of half a head.
    per_channel = 2 * kernel_size**2 + kernel_size
    forward = 2 * n * channels * height * width * per_channel
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() > 2 * forward


def test_nothing_of_the_size_of_the_window_is_kept_for_the_backward():
    inputs, options = make_inputs((1, 64, 40, 40, 8, 7), torch.float32, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        local_attention(*inputs, **options)
    size = inputs[0].numel()
    assert sum(x.numel() for x in saved) < 4.5 * size  # query, key, value, output, log-sum-exp


PEAK_MEMORY = """
import resource, torch
from sasa_det.ops import local_attention

def forward_and_backward(height, width, size):
    maps = [torch.randn(1, 64, height, width, requires_grad=True) for _ in range(3)]
    rows, cols = (torch.randn(8, size, 4, requires_grad=True) for _ in range(2))
    local_attention(*maps, rows, cols, num_heads=8, kernel_size=size).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

forward_and_backward(16, 16, 11)
before = peak()
forward_and_backward({}, {}, {})
print((peak() - before) / 2**20)
"""


def peak_memory(height: int, width: int, kernel_size: int) -> float:
    """Of forward and backward with 64 channels, in MiB, gradients and scratch memory included."""
    script = PEAK_MEMORY.format(height, width, kernel_size)
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return float(run.stdout)


def test_no_copies_of_the_window_exist_in_memory():
    # In maps of the query's size, 16 MiB; a copy of the keys and one of the values for each of the
    # 11 * 11 offsets would be 242.
    assert peak_memory(256, 256, 11) < 60 * 16


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1)])
def test_a_window_beyond_the_map_takes_no_memory(height, width):
    # 601 rows of keys by 599 columns of offsets were 5 GB.
    assert peak_memory(height, width, 601) < 60


# Cases small enough to be computed by hand.


def test_at_the_corner_only_the_positions_inside_the_map_share_the_softmax():
    # Equal logits everywhere: each position averages its clipped window. Zero padding would
    # divide the corner by 9 instead of 4.
    zeros = torch.zeros(1, 2, 3, 3)
    value = torch.arange(9.0).view(1, 1, 3, 3).repeat(1, 2, 1, 1)
    output = local_attention(zeros, zeros, value, None, None, num_heads=1, kernel_size=3)
    assert output[0, 0, 0, 0].item() == pytest.approx((0 + 1 + 3 + 4) / 4)
    assert output[0, 0, 0, 1].item() == pytest.approx((0 + 1 + 2 + 3 + 4 + 5) / 6)
    assert output[0, 0, 1, 1].item() == pytest.approx(4)


def test_index_zero_of_the_embeddings_is_the_offset_furthest_up_and_left():
    # The first half of the channels meets the rows: only the row above has a large embedding, so
    # each position copies the row above; likewise the second half and the column to the left.
    value = torch.arange(12.0).view(1, 1, 3, 4).repeat(1, 2, 1, 1)
    ones, zeros = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
    strong, weak = torch.zeros(1, 3, 1), torch.zeros(1, 3, 1)
    strong[0, 0] = 50.0
    options = {"num_heads": 1, "kernel_size": 3}
    above = local_attention(ones, zeros, value, strong, weak, **options)
    assert above[0, 0, 2, 1].item() == pytest.approx((4 + 5 + 6) / 3)
    left = local_attention(ones, zeros, value, weak, strong, **options)
    assert left[0, 0, 1, 2].item() == pytest.approx((1 + 5 + 9) / 3)


def test_rows_meet_the_first_half_of_the_channels_and_columns_the_second():
    query = torch.zeros(1, 4, 1, 3)
    query[:, :2] = 1.0  # only the half that meets the rows
    value = torch.arange(3.0).view(1, 1, 1, 3).repeat(1, 4, 1, 1)
    rows, cols = torch.zeros(1, 3, 2), torch.full((1, 3, 2), 50.0)
    cols[0, 0] = 0.0
    output = local_attention(query, query * 0, value, rows, cols, num_heads=1, kernel_size=3)
    assert output[0, 0, 0, 1].item() == pytest.approx(1)  # columns are not seen: plain average


def test_a_softmax_of_two_positions_by_hand():
    query = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).repeat(1, 1, 1, 2)
    key = torch.tensor([[0.5, 1.0], [0.25, -1.0]]).view(1, 2, 1, 2)
    value = torch.tensor([[3.0, 5.0], [7.0, 9.0]]).view(1, 2, 1, 2)
    rows, cols = torch.tensor([[[0.1], [0.2], [0.3]]]), torch.tensor([[[0.4], [0.5], [0.6]]])
    output = local_attention(query, key, value, rows, cols, num_heads=1, kernel_size=3)
    # Position 0 sees itself (row 0.2, column 0.5) and its right neighbour (row 0.2, column 0.6).
    itself = 1 * 0.5 + 2 * 0.25 + 1 * 0.2 + 2 * 0.5
    right = 1 * 1.0 + 2 * -1.0 + 1 * 0.2 + 2 * 0.6
    weight = math.exp(itself) / (math.exp(itself) + math.exp(right))
    assert output[0, 0, 0, 0].item() == pytest.approx(weight * 3 + (1 - weight) * 5)
    assert output[0, 1, 0, 0].item() == pytest.approx(weight * 7 + (1 - weight) * 9)


def test_attention_weights_are_the_softmax_of_the_operator():
    inputs, options = make_inputs((2, 8, 4, 5, 2, 7))
    query, key, value, rows, cols = inputs
    weights = local_attention_weights(query, key, rows, cols, **options)
    torch.testing.assert_close(weights.sum(dim=2), torch.ones(2, 2, 4, 5, dtype=torch.float64))
    padded = torch.nn.functional.unfold(value, 7, padding=3).view(2, 2, 4, 49, 4, 5)
    output = torch.einsum("nhkyx,nhdkyx->nhdyx", weights, padded).flatten(1, 2)
    torch.testing.assert_close(output, local_attention(*inputs, **options))


# Mistakes that public implementations of the paper make. Each is far from the operator, so the
# comparison with the reference above would fail on every one of them.


def unfolded(inputs, options):
    (query, key, value, rows, cols), heads = inputs, options["num_heads"]
    n, channels, height, width = query.shape
    k = options["kernel_size"]

    def windows(x):
        x = torch.nn.functional.unfold(x, k, padding=k // 2)
        return x.view(n, heads, channels // heads, k * k, height, width)

    q = query.view(n, heads, channels // heads, 1, height, width)
    half = channels // heads // 2
    r = torch.cat(
        [rows[:, :, None].expand(-1, k, k, half), cols[:, None].expand(-1, k, k, half)], dim=-1
    )
    r = r.flatten(1, 2).transpose(1, 2)[None, :, :, :, None, None]
    inside = windows(torch.ones_like(query))[:, :, :1] > 0
    return q, windows(key), windows(value), r, inside


def attend(logits, values, inside, dim=3):
    weights = logits.masked_fill(~inside, float("-inf")).softmax(dim=dim)
    return (weights * values).sum(dim=dim).flatten(1, 2)


def zero_padding(inputs, options):
    q, k, v, r, inside = unfolded(inputs, options)
    logits = (q * (k + r)).sum(dim=2, keepdim=True)
    return attend(logits, v, torch.ones_like(inside))


def product_without_sum(inputs, options):
    q, k, v, r, inside = unfolded(inputs, options)
    return attend(q * (k + r), v, inside)


def row_embeddings_for_half_the_heads(inputs, options):
    *_, rows, cols = inputs
    q, k, v, _, inside = unfolded(inputs, options)
    size = options["kernel_size"]
    whole = torch.cat([rows, cols], dim=-1)[:, :, None].expand(-1, -1, size, -1).clone()
    second = slice(rows.shape[0] // 2, None)
    whole[second] = whole[second].transpose(1, 2).clone()
    r = whole.flatten(1, 2).transpose(1, 2)[None, :, :, :, None, None]
    return attend((q * (k + r)).sum(dim=2, keepdim=True), v, inside)


def reshape_instead_of_permute(inputs, options):
    query, *others = inputs
    n, channels, height, width = query.shape
    heads = options["num_heads"]
    mixed = query.view(n, heads, height, width, channels // heads).permute(0, 1, 4, 2, 3)
    return local_attention(mixed.reshape_as(query), *others, **options)


def sums_before_the_product(inputs, options):
    q, k, v, r, inside = unfolded(inputs, options)
    position = q.sum(dim=2, keepdim=True) * r.sum(dim=2, keepdim=True)
    return attend((q * k).sum(dim=2, keepdim=True) + position, v, inside)


def embeddings_added_to_the_values(inputs, options):
    q, k, v, r, inside = unfolded(inputs, options)
    return attend((q * k).sum(dim=2, keepdim=True), v + r, inside)


def no_mistake(inputs, options):
    q, k, v, r, inside = unfolded(inputs, options)
    return attend((q * (k + r)).sum(dim=2, keepdim=True), v, inside)


@pytest.mark.parametrize(
    "mistake",
    [
        zero_padding,
        product_without_sum,
        row_embeddings_for_half_the_heads,
        reshape_instead_of_permute,
        sums_before_the_product,
        embeddings_added_to_the_values,
    ],
)
def test_known_mistakes_differ_from_the_operator(mistake):
    inputs, options = make_inputs((1, 8, 6, 7, 2, 5))
    output = local_attention(*inputs, **options)
    torch.testing.assert_close(no_mistake(inputs, options), output)
    assert (mistake(inputs, options) - output).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd.*is 4"),
        ({"num_heads": 3}, "8 channels do not divide into num_heads=3"),
        ({"num_heads": 8}, "head_dim must be even.*make it 1"),
        ({"rel_cols": None}, "must be given together"),
        ({"rel_rows": torch.zeros(2, 5, 2)}, r"rel_rows must have the shape \(2, 3, 2\)"),
        ({"key": torch.zeros(1, 8, 5, 5)}, "key must have the shape"),
        ({"value": torch.zeros(1, 8, 4, 5, dtype=torch.float64)}, "value must be torch.float32"),
        ({"query": torch.zeros(8, 4, 5)}, r"query must be \(N, C, H, W\)"),
        ({"query": torch.zeros(1, 8, 4, 5, dtype=torch.long)}, "floating point dtype"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_wrong_arguments_are_named(change, message):
    arguments = {name: torch.zeros(1, 8, 4, 5) for name in ("query", "key", "value")}
    arguments |= {name: torch.zeros(2, 3, 2) for name in ("rel_rows", "rel_cols")}
    with pytest.raises(ValueError, match=message):
        local_attention(**{**arguments, "num_heads": 2, "kernel_size": 3, **change})
