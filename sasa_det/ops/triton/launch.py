"""When Triton serves a call, and how a kernel is launched."""

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_BATCH = 65535  # CUDA's limit for the second number of a grid


def unavailable() -> str | None:
    """Why this machine does not have the backend; None if it does."""
    if not _installed():
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreted():
        return "there is no CUDA device, and TRITON_INTERPRET=1 was not set"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's environment variable TRITON_INTERPRET asks for its interpreter.

    It runs kernels on the CPU, very slowly, for tests. Whoever sets it gets it: then the backend
    serves CPU tensors, and no others.
    """
    # As Triton reads it.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def refuses_tensor(x: Tensor) -> str | None:
    """Why calls with such tensors are not served; None if they are."""
    # The cheapest question first: on a machine without CUDA every call asks.
    if x.device.type != ("cpu" if interpreted() else "cuda"):
        return f"it does not serve tensors on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"it does not serve {x.dtype}"
    if x.shape[0] > _MAX_BATCH:
        return f"it serves batches of up to {_MAX_BATCH} images, not {x.shape[0]}"
    return None if _installed() else "triton is not installed"


def on_device(x: Tensor) -> AbstractContextManager:
    """Within it kernels are launched on the device of ``x``."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


class Launch(NamedTuple):
    """A kernel with all it is launched with.

    Attributes:
        kernel: the function that ``triton.jit`` made.
        grid (tuple[int, ...]): number of programs.
        arguments (dict): tensors, numbers and tuples of them.
        constants (dict): what it is compiled for. In both there may be more than it takes.
        options (dict): num_warps, num_stages and what else Triton's compiler is told.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        if min(self.grid) < 1:  # empty batches have no programs
            return
        named = {**self.arguments, **self.constants}
        arguments = [named[name] for name in self.kernel.arg_names]
        # What Triton may compile for: of a tensor its dtype and alignment, else all of it.
        specialized = [
            (x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in arguments
        ]
        key = (self.kernel, _current_device(), *self.options.values(), *specialized)
        compiled = _COMPILED.get(key)
        if compiled is not None:
            compiled[(*self.grid, 1, 1)](*arguments)
            return
        compiled = self.kernel[self.grid](*arguments, **self.options)
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        if compiled is not None:  # the interpreter compiles nothing
            _COMPILED[key] = compiled


# Triton finds a compiled kernel by its arguments itself, but takes longer than many a kernel runs.
_COMPILED: dict[tuple, Any] = {}
# Strides differ with the size of images, of which there may be any number.
_MOST_COMPILED = 4096


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None
