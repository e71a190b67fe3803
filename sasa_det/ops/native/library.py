"""The compiled kernels: found, loaded with ctypes, and called.

They are plain C behind a plain C interface, because that outlives every upgrade of torch and of
Python. ``setup.py`` compiles them where there is a compiler; without them the eager path serves.
"""

import ctypes
import os
import sysconfig
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..calls import LARGE_BLOCK

# Values of the enumerations in calls.h and library.c.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

_FLOATS = ctypes.c_void_p


class Map(ctypes.Structure):
    """(N, C, H, W), as calls.h has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((f"stride_{axis}", ctypes.c_int64) for axis in "nchw"),
        ("dtype", ctypes.c_int64),
        ("ring", ctypes.c_int64),
    )

    @classmethod
    def of(cls, x: Tensor) -> "Map":
        return cls(x.data_ptr(), *x.stride(), DTYPES[x.dtype])


class AttentionArguments(ctypes.Structure):
    """AttentionCall of calls.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "heads", "head_dim", "height", "width")),
        ("kernel_size", ctypes.c_int64),
        ("bands", ctypes.c_int64),
        *((name, Map) for name in ("query", "key", "value", "output")),
        *((name, _FLOATS) for name in ("rel_rows", "rel_cols", "logsumexp")),
        ("in_channels", ctypes.c_int64),
        ("input", Map),
        *((name, _FLOATS) for name in ("projection", "bias")),
        ("residual", Map),
        *((name, _FLOATS) for name in ("output_scale", "output_shift")),
        *((name, Map) for name in ("grad_output", "grad_query", "grad_key", "grad_value")),
        ("grad_embeddings", _FLOATS),
        ("grad_input", Map),
        *((name, _FLOATS) for name in ("grad_projection", "grad_bias")),
        ("heads_done", ctypes.c_void_p),
    )


class StemArguments(ctypes.Structure):
    """StemCall of calls.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "in_channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("heads", "head_dim", "block_size", "bands")),
        *((name, Map) for name in ("image", "maximum")),
        *((name, _FLOATS) for name in ("content", "rel_rows", "rel_cols", "value_weights")),
        ("sums", _FLOATS),
        ("grad_maximum", Map),
        *((name, _FLOATS) for name in ("grad_sum", "grad_square_sum", "grad_weights")),
    )


class ResidualArguments(ctypes.Structure):
    """ResidualCall of calls.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("positions", "in_channels", "out_channels", "bands")),
        *((name, _FLOATS) for name in ("input", "residual", "weight", "bias", "output")),
    )


# By the name of the call in calls.h.
_STRUCTURES = {
    "attention": AttentionArguments,
    "stem": StemArguments,
    "residual": ResidualArguments,
}


@cache
def load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = Path(__file__).parent / f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    reason = None
    try:
        library = ctypes.CDLL(str(path))
        if not _fits(library):
            reason = "its C kernels were compiled for another version of sasa_det"
    except OSError as error:
        reason = f"its C kernels do not load ({error})"
        if not path.exists():
            reason = "its C kernels were not compiled, for want of a C compiler"
    if reason is None:
        return library
    warnings.warn(
        f"On the CPU, attention runs on the slower eager path: {reason}. "
        "Install sasa_det again where a C compiler is at hand.",
        stacklevel=2,
    )
    return reason


def _fits(library: ctypes.CDLL) -> bool:
    """Whether the structures above are those that it was compiled with."""
    sizes = {name: f"sasa_det_size_of_{name}_call" for name in _STRUCTURES}
    for function in ("sasa_det_instruction_set", "sasa_det_map_pages", *sizes.values()):
        if not hasattr(library, function):
            return False
        getattr(library, function).restype = ctypes.c_int64
    return all(
        getattr(library, sizes[name])() == ctypes.sizeof(structure)
        for name, structure in _STRUCTURES.items()
    )


def unavailable() -> str | None:
    """Why this machine has not got the kernels, in words; None where it has."""
    library = load()
    return library if isinstance(library, str) else None


def refuses(x: Tensor) -> str | None:
    """Why the kernels cannot compute with a tensor like ``x``; None where they can."""
    if x.device.type != "cpu":
        return f"it computes on the CPU, but the tensors are on {x.device}"
    if x.dtype not in DTYPES:
        return f"it computes in float32 and bfloat16, but the tensors are {x.dtype}"
    return unavailable()


@cache
def instruction_set() -> int:
    """Of ``INSTRUCTION_SETS``, the best one that this processor has."""
    return load().sasa_det_instruction_set()  # type: ignore[union-attr]


class _Threads:
    """OpenMP's, which a forked process does not inherit; GNU's OpenMP would wait for them for ever.

    So the kernels run in one thread there, if the parent had run them in several. So does torch
    then, whose operators would hang as well.
    """

    were_used = False
    are_lost = False

    def count(self) -> int:
        """How many to compute with."""
        threads = 1 if self.are_lost else torch.get_num_threads()
        self.were_used |= threads > 1
        return threads

    def after_fork(self) -> None:
        if self.were_used:
            self.are_lost = True
            torch.set_num_threads(1)


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.after_fork)


def mapped(x: Tensor) -> Tensor:
    """``x``, which nobody has written to yet; if its block is new, with all of its pages mapped."""
    if x.nbytes >= LARGE_BLOCK:
        load().sasa_det_map_pages(  # type: ignore[union-attr]
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(x.nbytes),
            ctypes.c_int64(_threads.count()),
        )
    return x


def run(function: str, arguments: ctypes.Structure) -> None:
    """Calls one of the library's functions.

    Raises:
        MemoryError: if there is not enough of it.
    """
    status = getattr(load(), function)(
        ctypes.byref(arguments), ctypes.c_int64(instruction_set()), ctypes.c_int64(_threads.count())
    )
    if status:
        raise MemoryError(f"{function} of sasa_det found no memory for its scratch space.")
