"""torch.compile: a compiled model calls the operators that it calls without it."""

import copy
import shutil
from collections import Counter

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition
from test_deployment import TWO_LEVELS, small
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from sasa_det.analysis.flops import _DetectorNetwork
from sasa_det.layers import LocalSelfAttention2d, PreActivationSelfAttention2d
from sasa_det.ops import available_backends, residual_projection, use_backend

# Inductor holds the fake implementations to their strides, but needs a compiler.
COMPILER = "inductor" if shutil.which("c++") else "aot_eager"
native = pytest.mark.skipif(available_backends()["native"] is not None, reason="no native backend")


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()


class Called(TorchDispatchMode):
    """Counts the package's operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sasa_det":
            self.counts[function.name()] += 1
        return function(*args, **(kwargs or {}))


def counting(counts):
    """A backend of torch.compile that counts the package's operators in the graphs it is given."""

    def compiler(graph, inputs):
        targets = (node.target for node in graph.graph.nodes if node.op == "call_function")
        names = (target.name() for target in targets if hasattr(target, "namespace"))
        counts.update(name for name in names if name.startswith("sasa_det::"))
        return graph

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def run(model, training, images):
    with torch.set_grad_enabled(training):
        logits, deltas = model(images)
        outputs = [*logits, *deltas]
    if training:
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = sum(x.square().sum() for x in outputs)
        outputs = [*outputs, *torch.autograd.grad(total, parameters, allow_unused=True)]
    return [x for x in outputs if x is not None]


@native
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_compiled_detector_calls_the_operators_of_one_that_is_not(training):
    torch.manual_seed(0)
    detector = small("retinanet_full_attn", *TWO_LEVELS).train(training)
    network = _DetectorNetwork(detector)
    compiled_network = copy.deepcopy(network)
    images = torch.randn(1, 3, 64, 96).to(memory_format=torch.channels_last)
    with Called() as called:
        wanted = run(network, training, images)
    counts = Counter()
    compiled = torch.compile(compiled_network, fullgraph=True, backend=counting(counts))
    actual = run(compiled, training, images)
    assert counts == called.counts
    assert counts["sasa_det::projected_attention"] == 16  # 8 bottlenecks; 4 layers for 2 levels
    assert counts["sasa_det::residual_projection"] == (0 if training else 3)  # of large maps
    for a, w in zip(actual, wanted, strict=True):
        assert (a - w).norm() <= 1e-3 * w.norm() + 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_compiled_layer_has_the_strides_and_the_numbers_of_one_that_is_not(training, layout):
    layer = LocalSelfAttention2d(16, 24, kernel_size=5, num_heads=2)
    residual = torch.randn(2, 24, 9, 14).contiguous(memory_format=layout).requires_grad_()
    x = torch.randn(2, 16, 9, 14).contiguous(memory_format=layout).requires_grad_()
    affine = torch.randn(2, 24) if not training else (None, None)
    leaves = [x, residual, *layer.parameters()]

    def call(x, residual):
        return layer.add_to(residual, x, *affine)

    compiled = torch.compile(call, fullgraph=True, backend=COMPILER)
    for backend in ("native", "eager"):
        if available_backends()[backend] is not None:
            continue
        with use_backend(backend), torch.set_grad_enabled(training):
            wanted, actual = call(x, residual), compiled(x, residual)
            assert actual.stride() == wanted.stride()
            results = [wanted], [actual]
            if training:
                results = [torch.autograd.grad(y.square().sum(), leaves) for (y,) in results]
        for w, a in zip(*results, strict=True):
            torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_of_a_head_keeps_its_input_and_no_normalised_map():
    layer = PreActivationSelfAttention2d(LocalSelfAttention2d(32, 32), nn.GroupNorm(8, 32))
    x = torch.randn(1, 32, 20, 30, requires_grad=True)
    kept = []

    def compiler(graph, inputs):
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        kept.append([y.name for y in outputs if y.meta["val"].shape == x.shape])
        return graph

    backend = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=lambda graph, inputs: graph,
        partition_fn=min_cut_rematerialization_partition,
    )
    actual = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert len(kept) == 1
    assert len(kept[0]) == 2  # the output, and the input
    wanted = layer(x)
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (actual, wanted)
    ]
    for a, w in zip((actual, *grads[0]), (wanted, *grads[1]), strict=True):
        torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_residual_that_is_broadcast_or_wider_compiles_as_well():
    layer, x = LocalSelfAttention2d(8, 8, kernel_size=3, num_heads=2), torch.randn(1, 8, 5, 6)
    weight = torch.randn(8, 8, 1, 1)
    calls = (
        lambda residual: layer.add_to(residual, x),
        lambda residual: residual_projection(residual, x, weight),
    )
    for call in calls:
        compiled = torch.compile(call, fullgraph=True, backend=COMPILER)
        for residual in (torch.randn(1, 8, 1, 1), torch.randn(1, 8, 5, 6).double()):
            wanted, actual = call(residual), compiled(residual)
            assert actual.dtype == wanted.dtype
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_takes_other_sizes_and_threads_than_the_first(monkeypatch):
    """With eight threads a low map is no longer projected row by row."""
    layer = LocalSelfAttention2d(16, 16, kernel_size=7, num_heads=8)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(torch.randn(1, 16, 24, 25, requires_grad=True))
    for threads in (1, 8):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for height, width in ((9, 14), (20, 20), (41, 5), (60, 3)):
            x = torch.randn(1, 16, height, width, requires_grad=True)
            with torch._dynamo.config.patch(error_on_recompile=True):
                actual = compiled(x)
            wanted = layer(x)
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
            (wanted,), (actual,) = (torch.autograd.grad(y.sum(), x) for y in (wanted, actual))
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
