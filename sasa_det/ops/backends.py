"""Which implementation serves a call of an operator.

Automatically, it is the first in ``_IMPLEMENTATIONS`` that does not refuse. :func:`use_backend` or
the environment variable ``SASA_DET_BACKEND`` name one that must serve every call.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import eager, eager_pooled_stem, eager_stem, native, triton
from .calls import AttentionCall, ProjectedCall, ResidualCall, StemCall
from .native import attention as native_attention
from .native import projected as native_projected
from .native import residual as native_residual
from .native import stem as native_stem
from .operator import shows_steps
from .triton import attention as triton_attention
from .triton import stem as triton_stem

Call = AttentionCall | ProjectedCall | ResidualCall | StemCall


class Implementation(Protocol):
    """What a backend has for an operator: a module with these functions."""

    def refuses(self, call: Any, /) -> str | None:
        """Why this call is not served; None if it is."""

    def forward(self, call: Any, /) -> Any:
        """What the operator returns."""

    def backward(self, call: Any, /, *grads_and_saved: Any) -> list:
        """What the operator's backward returns."""


# Fastest first; eager serves every call. Where nothing serves projected_attention or
# residual_projection, steps.py does.
_IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {
    "local_attention": {"triton": triton_attention, "native": native_attention, "eager": eager},
    "projected_attention": {"native": native_projected},
    "residual_projection": {"native": cast(Implementation, native_residual)},  # has no backward
    "stem_attention": {"eager": eager_stem},
    "stem_attention_pooled": {
        "triton": triton_stem,
        "native": native_stem,
        "eager": eager_pooled_stem,
    },
}
_UNAVAILABLE: dict[str, Callable[[], str | None]] = {
    "triton": triton.unavailable,
    "native": native.unavailable,
    "eager": lambda: None,
}

# Names, the last of which counts. There is one list for all threads, because autograd runs the
# backward of CUDA in a thread of its own.
_asked_for: list[str] = []


def available_backends() -> dict[str, str | None]:
    """The backends by name; with each, None if this machine has it, else why it has not.

    Example::

        >>> available_backends()
        {'triton': 'there is no CUDA device', 'native': None, 'eager': None}
    """
    return {name: reason() for name, reason in _UNAVAILABLE.items()}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within it every call, the backward's too, is served by this backend or raises.

    Args:
        name (str): one of :func:`available_backends`.

    Raises:
        ValueError: at once, for a name that does not exist.
        RuntimeError: from the operators, where the backend does not serve a call; it says why.
    """
    _asked_for.append(_checked(name))
    try:
        yield
    finally:
        # Its own: threads leave in any order.
        del _asked_for[len(_asked_for) - 1 - _asked_for[::-1].index(name)]


def find(operator: str, call: Call) -> Implementation | None:
    """The implementation that serves this call of this operator, if there is one."""
    for name, implementation in _IMPLEMENTATIONS[operator].items():
        if allows(name) and implementation.refuses(call) is None:
            return implementation
    return None


def is_one_operator(operator: str, call: ProjectedCall | ResidualCall) -> bool:
    """Whether the operator is to compute this call, and not its steps one after another."""
    if shows_steps():
        return False
    if torch.compiler.is_compiling():
        # Nothing that may change later; the operator itself looks for a kernel at each call.
        fits = call.residual is None or call.residual.shape == call.output_shape()
        return fits and all(_is_on_cpu_in_float32(x) for x in call if isinstance(x, Tensor))
    return find(operator, call) is not None


def _is_on_cpu_in_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def allows(name: str) -> bool:
    """Whether this backend may serve calls: each may, unless another one was asked for."""
    return not _asked_for or _asked_for[-1] == name


def choose(operator: str, call: Call) -> Implementation:
    """The implementation that serves this call of this operator.

    Raises:
        RuntimeError: if there is none; it says why.
    """
    found = find(operator, call)
    if found is not None:
        return found
    name = _asked_for[-1] if _asked_for else next(iter(_IMPLEMENTATIONS[operator]))
    implementation = _IMPLEMENTATIONS[operator].get(name)
    reason = "it does not implement it" if implementation is None else implementation.refuses(call)
    raise RuntimeError(
        f"The backend {name!r} was asked for but does not serve this call of {operator}: {reason}."
    )


def _checked(name: str) -> str:
    if name not in _UNAVAILABLE:
        raise ValueError(f"There is no backend {name!r}; choose one of {sorted(_UNAVAILABLE)}.")
    return name


if os.environ.get("SASA_DET_BACKEND"):
    _asked_for.append(_checked(os.environ["SASA_DET_BACKEND"]))
