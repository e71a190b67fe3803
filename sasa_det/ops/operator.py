"""An operator of torch whose implementation is called at once where nobody would notice."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import _profiler_enabled, forward_ad
from torch.library import custom_op
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """A function as an operator of torch, ``sasa_det::<name>``.

    Autograd, tracers, compilers, FLOP counters and profilers see it. The way through torch's
    dispatcher can take longer than a kernel: beside a GPU, 0.17 ms instead of 0.07 forward were
    measured, 0.49 instead of 0.31 backward. Where none of these is at work, there is no such way.

    Args:
        signature (str): name and schema, ``"f(Tensor x, int n) -> Tensor"``; nothing is mutated.
        function: computes it; called with autocast off, because the tensors have been cast.
    """

    def __init__(self, signature: str, function: Callable) -> None:
        name, parenthesis, schema = signature.partition("(")
        self._name = name
        self._function = without_autocast(function)
        self._registered = custom_op(
            f"sasa_det::{name}", self._function, mutates_args=(), schema=parenthesis + schema
        )
        self.register_fake = self._registered.register_fake
        self.register_autograd = self._registered.register_autograd

    def __call__(self, *arguments: Any) -> Any:
        if _has_tangent(arguments):
            # torch would take the derivative for zero.
            raise NotImplementedError(
                f"sasa_det::{self._name} has no derivative in forward mode; "
                "use torch.autograd.grad or backward()."
            )
        # A compiler cannot read the last question, and gets no further than the second.
        if torch.is_grad_enabled() or needs_dispatcher(arguments) or _profiler_enabled():
            return self._registered(*arguments)
        return self._function(*arguments)


def operator(signature: str) -> Callable[[Callable], Operator]:
    """As a decorator: see :class:`Operator`."""
    return lambda function: Operator(signature, function)


def makes_a_program() -> bool:
    """Whether what is called is to be traced or compiled, and not only computed."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling()


def shows_steps() -> bool:
    """Whether a trace or an exported program is made, for others to read and to run elsewhere."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def autocast_is_on(device_type: str) -> bool:
    """Of a device that has it, which not all have."""
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def needs_dispatcher(arguments: tuple[Any, ...]) -> bool:
    """Whether anything but autograd wants to see what operators are called with, or must."""
    if makes_a_program() or is_in_torch_dispatch_mode():
        return True
    if torch._C._are_functorch_transforms_active() or _has_tangent(arguments):
        return True
    return any(_is_special(x) for x in arguments if isinstance(x, Tensor))


def _is_special(x: Tensor) -> bool:
    """Whether its memory is not all there is to it: subclasses have their own ways, tensors
    without numbers only have shapes, and a minus sign may have been put off."""
    return type(x) not in (Tensor, nn.Parameter) or x.is_meta or x.is_neg()


def _has_tangent(arguments: tuple[Any, ...]) -> bool:
    if forward_ad._current_level < 0:
        return False
    tensors = (x for x in arguments if isinstance(x, Tensor))
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def once_differentiable(backward: Callable) -> Callable:
    """For the backward of a ``torch.autograd.Function``: derivatives of its results are refused.

    torch's own does so if the gradient that comes in has a derivative; else it returns constants.
    """

    @wraps(backward)
    def call(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        of_tensors = (x.detach().requires_grad_() for x in results if x is not None)
        refusing = iter(_WithoutDerivative.apply(*of_tensors))
        return tuple(None if x is None else next(refusing) for x in results)

    return call


class _WithoutDerivative(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, *results: Tensor) -> tuple[Tensor, ...]:
        return results

    @staticmethod
    def backward(_: Any, *__: Tensor) -> None:
        raise RuntimeError("The attention of sasa_det and its norms have no second derivative.")


def without_autocast(function: Callable) -> Callable:
    """It would reach into what computes in float32."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        device = arguments[0].device.type
        if not autocast_is_on(device):
            return function(*arguments)
        if torch.compiler.is_compiling():  # which does not know the other way
            with torch.autocast(device, enabled=False):
                return function(*arguments)
        # By hand: torch.autocast asks many questions before it does this.
        torch.set_autocast_enabled(device, False)
        try:
            return function(*arguments)
        finally:
            torch.set_autocast_enabled(device, True)

    return call
