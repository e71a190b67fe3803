"""Operators, and when they are called at once instead of through torch's dispatcher."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sasa_det.layers import LocalSelfAttention2d
from sasa_det.ops import local_attention
from sasa_det.ops.operator import operator

CALLS = []


@operator("counted_sum(Tensor a, Tensor b) -> Tensor")
def counted_sum(a, b):
    CALLS.append(torch.is_autocast_enabled("cpu"))
    return a + b


@counted_sum.register_fake
def _(a, b):
    return torch.empty_like(a)


@pytest.fixture
def dispatched(monkeypatch):
    """How often the operator was called through the dispatcher."""
    times = []
    registered = counted_sum._registered
    monkeypatch.setattr(counted_sum, "_registered", lambda *x: times.append(1) or registered(*x))
    return times


def test_without_gradients_it_is_called_at_once(dispatched):
    a = torch.randn(3)
    with torch.no_grad():
        assert torch.equal(counted_sum(a, a), 2 * a)
    assert not dispatched
    counted_sum(a, a)
    assert dispatched


@pytest.mark.parametrize(
    "watching",
    [
        lambda: FlopCounterMode(display=False),
        lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        lambda: torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True),
    ],
    ids=["FLOP counter", "profiler", "fake tensors"],
)
def test_it_is_dispatched_where_somebody_watches(dispatched, watching):
    a = torch.randn(3)
    with torch.no_grad(), watching():
        counted_sum(a, a)
    assert dispatched


def test_a_minus_sign_that_was_put_off_is_not_lost():
    q = torch.complex(torch.zeros(1, 4, 3, 3), torch.randn(1, 4, 3, 3)).conj().imag
    assert q.is_neg()
    arguments = {"rel_rows": None, "rel_cols": None, "num_heads": 2, "kernel_size": 3}
    with torch.no_grad():
        output = local_attention(q, q, q, **arguments)
        assert torch.equal(output, local_attention(*[q.resolve_neg()] * 3, **arguments))


def test_forward_mode_is_refused_and_not_taken_for_zero():
    a = torch.randn(3)
    for call in (counted_sum, torch.no_grad()(counted_sum)):
        with pytest.raises(NotImplementedError, match="counted_sum has no derivative in forward"):
            torch.func.jvp(lambda x, call=call: call(x, x), (a,), (a,))


def test_tensors_without_numbers_and_of_other_classes_are_dispatched(dispatched):
    class Named(torch.Tensor):
        pass

    with torch.no_grad():
        counted_sum(torch.empty(3, device="meta"), torch.empty(3, device="meta"))
        assert len(dispatched) == 1
        counted_sum(torch.randn(3).as_subclass(Named), torch.randn(3))
        assert len(dispatched) == 2


def test_autocast_is_off_inside_and_on_again_behind():
    a = torch.randn(3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        counted_sum(a, a)
        assert torch.is_autocast_enabled("cpu")
    assert CALLS[-1] is False


def test_flops_of_a_layer_are_the_same_with_and_without_gradients():
    layer, x = LocalSelfAttention2d(16, 16), torch.randn(1, 16, 8, 8)
    counted = []
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), FlopCounterMode(display=False) as counter:
            layer(x)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 0
