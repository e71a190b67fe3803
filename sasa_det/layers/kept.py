"""What the backward needs and computes again, so that it takes no memory until then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sasa_det.ops.operator import autocast_is_on, somebody_looks


@contextmanager
def computed_again(x: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Within it ``x``, or what became of it in place, is not kept where the backward needs it.

    It is computed once for all who need it, and kept from the first to the last of them. Whoever
    has hooks on all that is kept, as activation checkpointing has, keeps it in his own way.

    Args:
        x (Tensor): what is not to be kept.
        compute: computes it for the backward, without gradients and in the autocast of now; may
            hold nothing that is not kept anyway.
    """
    if somebody_looks((x,)) or not _hooks_are_free():
        yield
        return
    # Not the tensor, which the hooks would keep alive.
    key, device = _identity(x), x.device.type
    autocast = autocast_is_on(device)
    dtype = torch.get_autocast_dtype(device) if autocast else None
    needs = 0  # how often the forward kept it
    left = 0  # how often the backward still asks for what it has computed
    value: Tensor | None = None

    def pack(kept: Tensor) -> Tensor | None:
        nonlocal needs
        if _identity(kept) != key:
            return kept.detach()  # else a node that keeps its own output would keep itself alive
        needs += 1
        return None

    def unpack(packed: Tensor | None) -> Tensor:
        nonlocal left, value
        if packed is not None:
            return packed
        result = value
        if result is None:
            with torch.no_grad(), torch.autocast(device, dtype, enabled=autocast):
                result, left = compute(), needs
        left -= 1
        value = result if left > 0 else None
        return result

    with saved_tensors_hooks(pack, unpack):
        yield


def _hooks_are_free() -> bool:
    """Whether nobody else has hooks on what is kept, or forbids them."""
    autograd: Any = torch._C._autograd
    enabled = autograd._saved_tensors_hooks_is_enabled()
    return enabled and autograd._top_saved_tensors_default_hooks(False) is None


def _identity(x: Tensor) -> tuple:
    """What no two tensors have in common while both exist, but for views that are the same."""
    return x.data_ptr(), x.shape, x.stride(), x.dtype
