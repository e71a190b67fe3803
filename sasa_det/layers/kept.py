"""What the backward needs and computes again, so that it takes no memory until then."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sasa_det.ops.operator import autocast_is_on, needs_dispatcher


def computed_again(
    x: Tensor, compute: Callable[..., Tensor], *inputs: Tensor | None
) -> AbstractContextManager:
    """Within it ``x``, or what became of it in place, is not kept where the backward needs it.

    It is computed once for all who need it, and kept from the first to the last of them. Whoever
    has hooks on all that is kept, as activation checkpointing has, keeps it in his own way.

    Args:
        x (Tensor): what is not to be kept.
        compute: computes it for the backward, without gradients and in the autocast of now.
        inputs (Tensor or None): what it is called with, which others keep anyway.
    """
    if needs_dispatcher((x,)) or not _hooks_are_free():
        return nullcontext()
    hooks = _ComputedAgain(x, compute, inputs)
    return saved_tensors_hooks(hooks.pack, hooks.unpack)


class _Kept(NamedTuple):
    """A tensor as it was: torch leaves it to hooks whether it was changed in place since then."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, x: Tensor) -> "_Kept":
        # Detached: a node that keeps its own output would keep itself alive.
        return cls(x.detach(), x._version)

    def unchanged(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "A tensor needed for gradient computation has been modified by an inplace "
                f"operation: it has the shape {tuple(self.tensor.shape)}, and is at version "
                f"{self.tensor._version} instead of {self.version}. Change a copy of it."
            )
        return self.tensor


class _ComputedAgain:
    def __init__(
        self, x: Tensor, compute: Callable[..., Tensor], inputs: tuple[Tensor | None, ...]
    ) -> None:
        # Not the tensor, which the hooks would keep alive.
        self.identity, self.device = _identity(x), x.device.type
        self.autocast = autocast_is_on(self.device)
        self.dtype = torch.get_autocast_dtype(self.device) if self.autocast else None
        self.compute = compute
        self.inputs = [None if t is None else _Kept.of(t) for t in inputs]
        self.needs = 0  # how often the forward kept it
        self.left = 0  # how often the backward still asks for what it has computed
        self.value: Tensor | None = None

    def pack(self, kept: Tensor) -> _Kept | None:
        if _identity(kept) != self.identity:
            return _Kept.of(kept)
        self.needs += 1
        return None

    def unpack(self, packed: _Kept | None) -> Tensor:
        if packed is not None:
            return packed.unchanged()
        value = self.value
        if value is None:
            inputs = [None if kept is None else kept.unchanged() for kept in self.inputs]
            with torch.no_grad(), torch.autocast(self.device, self.dtype, enabled=self.autocast):
                value = self.compute(*inputs)
            self.left = self.needs
        self.left -= 1
        self.value = value if self.left > 0 else None
        return value


def _hooks_are_free() -> bool:
    """Whether nobody else has hooks on what is kept, or forbids them."""
    autograd: Any = torch._C._autograd
    enabled = autograd._saved_tensors_hooks_is_enabled()
    return enabled and autograd._top_saved_tensors_default_hooks(False) is None


def _identity(x: Tensor) -> tuple:
    """What no two tensors have in common while both exist, but for views that are the same."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
