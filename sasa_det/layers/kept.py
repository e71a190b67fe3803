"""What the backward needs and computes again, so that it takes no memory until then."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def computed_again(x: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """Within it ``x``, or what became of it in place, is not kept where the backward needs it.

    Whoever has hooks on all that is kept, as activation checkpointing has, keeps it in his own way.

    Args:
        x (Tensor): what is not to be kept.
        compute: computes it for the backward, without gradients and in the autocast of now; may
            hold nothing that is not kept anyway.
    """
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        yield
        return
    # Not the tensor, which the hooks would keep alive.
    address, shape, device = x.data_ptr(), x.shape, x.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    needs = 0  # how often the forward kept it
    left = 0  # how often the backward still asks for what it has computed
    value: Tensor | None = None

    def pack(kept: Tensor) -> Tensor | None:
        nonlocal needs
        if kept.data_ptr() != address or kept.shape != shape:
            return kept
        needs += 1
        return None

    def unpack(packed: Tensor | None) -> Tensor:
        nonlocal left, value
        if packed is not None:
            return packed
        if value is None:
            with torch.no_grad(), torch.autocast(device, autocast[1], enabled=autocast[0]):
                value, left = compute(), needs
        result, left = value, left - 1
        if left == 0:
            value = None
        return result

    with saved_tensors_hooks(pack, unpack):
        yield
