"""The operators under calls that nobody thought of: hypothesis draws shapes, layouts and values.

Two thousand calls here, the same each time; `make test-all` draws ten times as many, new ones.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sasa_det.ops import (
    available_backends,
    local_attention,
    projected_attention,
    stem_attention,
    stem_attention_pooled,
    use_backend,
)
from sasa_det.ops.reference import local_attention_reference

BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in available_backends().items()
]
on_each_backend = pytest.mark.parametrize("backend", BACKENDS)
DTYPES = {
    "eager": [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    "native": [torch.float32, torch.bfloat16],
    "triton": [torch.float32, torch.bfloat16, torch.float16],
}


@dataclass(repr=False)
class Call:
    """A drawn call of ``local_attention``."""

    maps: list[torch.Tensor]
    embeddings: list[torch.Tensor | None]
    num_heads: int
    kernel_size: int

    def __repr__(self):
        layouts = [(tuple(x.shape), x.stride()) for x in self.tensors]
        return f"Call({self.maps[0].dtype}, {layouts}, {self.options})"

    @property
    def options(self):
        return {"num_heads": self.num_heads, "kernel_size": self.kernel_size}

    @property
    def tensors(self):
        return [*self.maps, *(x for x in self.embeddings if x is not None)]


def seeded(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def transposed(x):
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def amid_others(x):
    """A part of a larger map, around which nothing may be read."""
    whole = torch.full([size + 3 for size in x.shape], torch.nan, dtype=x.dtype)
    part = whole[tuple(slice(1, 1 + size) for size in x.shape)]
    return part.copy_(x)


def every_second(x):
    return x.repeat_interleave(2, dim=3)[..., ::2]


LAYOUTS = [contiguous, channels_last, transposed, amid_others, every_second]


@st.composite
def calls(draw, backend):
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    dtype = draw(st.sampled_from(DTYPES[backend]))
    heads = draw(st.integers(1, 4))
    head_dim = 2 * draw(st.one_of(st.integers(1, 4), st.sampled_from([8, 10, 16])))
    height, width = draw(st.integers(1, 14)), draw(st.one_of(st.integers(1, 14), st.just(37)))
    kernel_size = 2 * draw(st.integers(0, 5)) + 1
    scale = draw(st.sampled_from([0.1, 1.0, 5.0]))

    def values(*shape):
        return (seeded(draw(st.integers(0, 2**31)), *shape) * scale).to(dtype)

    batch = draw(st.integers(1, 3))
    maps = [
        draw(st.sampled_from(LAYOUTS))(values(batch, heads * head_dim, height, width)).to(device)
        for _ in range(3)
    ]
    embeddings = [None, None]
    if draw(st.booleans()):
        embeddings = [values(heads, kernel_size, head_dim // 2).to(device) for _ in range(2)]
    return Call(maps, embeddings, heads, kernel_size)


def windowed_reference(query, key, value, rel_rows, rel_cols, *, num_heads, kernel_size):
    """Eq. 3 in float64 with a copy of the window at each position: what the project avoids."""
    n, channels, height, width = query.shape
    radius, window = kernel_size // 2, kernel_size**2

    def windows(x):
        padded = F.pad(x.double(), [radius] * 4)
        copies = F.unfold(padded, kernel_size)
        return copies.view(n, num_heads, -1, window, height * width)

    split = (n, num_heads, channels // num_heads, 1, height * width)
    keys = windows(key)
    if rel_rows is not None:
        rows = rel_rows.double().repeat_interleave(kernel_size, dim=1)
        cols = rel_cols.double().repeat(1, kernel_size, 1)
        keys = keys + torch.cat([rows, cols], dim=2).transpose(1, 2)[None, ..., None]
    logits = (query.double().reshape(split) * keys).sum(dim=2)
    inside = F.unfold(F.pad(torch.ones(1, 1, height, width), [radius] * 4), kernel_size)
    logits = logits.masked_fill(inside.to(logits.device) == 0, -torch.inf)
    output = (logits.softmax(dim=2).unsqueeze(2) * windows(value)).sum(dim=3)
    return output.reshape(n, channels, height, width)


def largest(*tensors):
    return max(float(x.detach().abs().max()) for x in tensors)


def rounding(call):
    """What rounding may do to a result of unit size: of the sums, of the logits, of the result."""
    dtype, head_dim = call.maps[0].dtype, call.maps[0].shape[1] // call.num_heads
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    query, key, _, *embeddings = call.tensors
    logit = head_dim * largest(query) * (largest(key) + (largest(*embeddings) if embeddings else 0))
    return 4 * (compute * (call.kernel_size**2 + head_dim + logit) + torch.finfo(dtype).eps)


def check_call(call):
    leaves = [x.detach().requires_grad_() for x in call.tensors]
    exact_leaves = [x.detach().double().requires_grad_() for x in call.tensors]
    none = [None] * (5 - len(leaves))
    output = local_attention(*leaves, *none, **call.options)
    exact = windowed_reference(*exact_leaves, *none, **call.options)
    query, key, value, *embeddings = leaves
    bound = rounding(call)
    assert (output.double() - exact).abs().max() <= bound * largest(value)

    grad = seeded(0, *output.shape).to(output)
    grads = torch.autograd.grad(output, leaves, grad)
    exact_grads = torch.autograd.grad(exact, exact_leaves, grad.double())
    # Every gradient is a sum of products of these; keys, values and embeddings sum many of them.
    positions, head_dim = query[0, 0].numel(), query.shape[1] // call.num_heads
    of_logits = largest(grad) * largest(value) * head_dim
    meets = [largest(key, *embeddings), largest(query) * positions, None]
    scales = [of_logits * x for x in meets[:2]] + [largest(grad) * positions]
    scales += [of_logits * largest(query) * positions * len(query)] * len(embeddings)
    for actual, wanted, scale in zip(grads, exact_grads, scales):
        assert (actual.double() - wanted).abs().max() <= bound * scale


@on_each_backend
def test_output_and_gradients_are_those_of_eq_3(backend):
    @settings(max_examples=settings().max_examples * 5)
    @given(calls(backend))
    def holds(call):
        with use_backend(backend):
            check_call(call)

    holds()


@given(calls("eager"))
def test_the_reference_of_these_tests_is_the_one_that_follows_the_paper_literally(call):
    if call.maps[0][0, 0].numel() > 30:
        call.maps = [x[..., :5, :6] for x in call.maps]
    arguments = [*call.maps, *call.embeddings]
    expected = local_attention_reference(*arguments, **call.options)
    actual = windowed_reference(*arguments, **call.options)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@on_each_backend
def test_away_from_the_border_moving_the_map_moves_the_output(backend):
    @given(calls(backend), st.integers(0, 4), st.integers(0, 4))
    def holds(call, down, right):
        radius = call.kernel_size // 2
        with use_backend(backend):
            whole = local_attention(*call.maps, *call.embeddings, **call.options)
            parts = [x[..., down:, right:] for x in call.maps]
            if not parts[0].numel():
                return
            part = local_attention(*parts, *call.embeddings, **call.options)
        moved, kept = whole[..., down + radius :, right + radius :], part[..., radius:, radius:]
        if kept.numel():
            bound = 2 * rounding(call) * largest(call.maps[2])
            assert (moved.double() - kept.double()).abs().max() <= bound

    holds()


@on_each_backend
def test_permuted_heads_give_the_permuted_output(backend):
    @given(calls(backend), st.randoms(use_true_random=False))
    def holds(call, random):
        order = torch.tensor(random.sample(range(call.num_heads), call.num_heads))
        shape = call.maps[0].shape

        def permute(x):
            heads = x.view(shape[0], call.num_heads, -1, *shape[2:])[:, order.to(x.device)]
            return heads.reshape(shape)

        maps = [permute(x.contiguous()) for x in call.maps]
        embeddings = [x if x is None else x[order.to(x.device)] for x in call.embeddings]
        with use_backend(backend):
            expected = permute(local_attention(*call.maps, *call.embeddings, **call.options))
            actual = local_attention(*maps, *embeddings, **call.options)
        bound = 2 * rounding(call) * largest(call.maps[2])
        assert (actual.double() - expected.double()).abs().max() <= bound

    holds()


@given(calls("native"), st.integers(1, 9), st.sampled_from([0.0, 3.0]))
def test_a_fused_projection_changes_nothing_but_rounding(call, in_channels, residual_scale):
    query = call.maps[0]
    x = query[:, :1].float().repeat(1, in_channels, 1, 1) + torch.arange(in_channels).view(-1, 1, 1)
    x = (x / in_channels).requires_grad_()
    weight = seeded(0, 3 * query.shape[1], in_channels, 1, 1).requires_grad_()
    embeddings = [e if e is None else e.float() for e in call.embeddings]
    residual = seeded(1, *query.shape) * residual_scale if residual_scale else None
    output = projected_attention(x, weight, *embeddings, residual=residual, **call.options)
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    maps = F.conv2d(exact_x, exact_weight).chunk(3, dim=1)
    exact = windowed_reference(*maps, *embeddings, **call.options)
    fused = Call([m.float() for m in maps], embeddings, call.num_heads, call.kernel_size)
    bound = rounding(fused) * in_channels
    added = torch.zeros(()) if residual is None else residual.double()
    error = (output.double() - exact - added).abs().max()
    assert error <= bound * (largest(maps[2]) + residual_scale)
    grads = torch.autograd.grad(output.sum(), [x, weight])
    exact_grads = torch.autograd.grad(exact.sum(), [exact_x, exact_weight])
    positions, head_dim = x[0, 0].numel(), query.shape[1] // call.num_heads
    of_logits = largest(maps[2]) * largest(maps[0], maps[1], *fused.tensors[3:]) * head_dim
    scale = (1 + of_logits) * query.shape[1] * positions * largest(weight, x) * len(x)
    for actual, wanted in zip(grads, exact_grads):
        assert (actual.double() - wanted).abs().max() <= bound * scale


@st.composite
def stem_calls(draw, backend):
    """The arguments of ``stem_attention_pooled``."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    dtype = draw(st.sampled_from(DTYPES[backend]))
    most_channels, largest_block = (3, 4) if backend == "triton" else (4, 5)
    in_channels, mixtures = draw(st.integers(1, most_channels)), draw(st.integers(1, 4))
    block = draw(st.integers(1, largest_block))
    heads = draw(st.integers(1, 4))
    channels = heads * 2 * draw(st.integers(1, 8))
    height, width = draw(st.integers(1, 14)), draw(st.integers(1, 40))
    shapes = [(draw(st.integers(1, 3)), in_channels, height, width)]
    shapes += [(channels, in_channels)] * 2 + [(mixtures, channels, in_channels)]
    shapes += [(mixtures, block, block)]
    relative = draw(st.booleans())
    shapes += [(heads, 2 * block - 1, channels // heads // 2)] * 2 if relative else []
    tensors = [seeded(draw(st.integers(0, 2**31)), *shape) for shape in shapes]
    tensors[0] = draw(st.sampled_from(LAYOUTS))(tensors[0])
    tensors[4] = tensors[4].softmax(dim=0)
    return [x.to(device, dtype) for x in tensors], heads


@on_each_backend
def test_the_pooled_stem_is_the_stem_pooled(backend):
    @given(stem_calls(backend))
    def holds(call):
        tensors, heads = call
        none = [None] * (7 - len(tensors))
        leaves = [x.detach().requires_grad_() for x in tensors[1:]]
        exact_leaves = [x.detach().double().requires_grad_() for x in tensors[1:]]
        with use_backend(backend):
            results = stem_attention_pooled(tensors[0], *leaves, *none, num_heads=heads)
            grads = torch.autograd.grad(sum(x.float().sum() for x in results), leaves)
        full = stem_attention(tensors[0].double(), *exact_leaves, *none, num_heads=heads)
        block = tensors[4].shape[-1]
        exact = [F.max_pool2d(full, block, ceil_mode=True)]
        exact += [full.sum(dim=(0, 2, 3)), full.square().sum(dim=(0, 2, 3))]
        eps = torch.finfo(tensors[0].dtype).eps
        for actual, wanted in zip(results, exact):
            assert (actual.double() - wanted).norm() <= 100 * eps * (1 + wanted.norm())
        exact_grads = torch.autograd.grad(sum(x.sum() for x in exact), exact_leaves)
        # Sums of squares over an image: float16 cannot hold the gradients of all of them.
        assume(all(x.abs().max() < torch.finfo(tensors[0].dtype).max / 2 for x in exact_grads))
        size = sum(x.norm() for x in exact_grads)
        for actual, wanted in zip(grads, exact_grads):
            assert (actual.double() - wanted).norm() <= 100 * eps * (1 + size)

    holds()
