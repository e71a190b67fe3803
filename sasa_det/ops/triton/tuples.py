"""Tuples of tensors in kernels: what a thread has of several channels, positions or offsets.

The compiler unrolls the loops in which they grow, so each entry is a register.
"""

# mypy: disable-error-code="assignment, misc"

import triton
import triton.language as tl


@triton.jit
def repeat(x, COUNT: tl.constexpr):
    repeated = ()
    for _ in tl.static_range(COUNT):
        repeated += (x,)
    return repeated


@triton.jit
def scale(x, factor, COUNT: tl.constexpr):
    scaled = ()
    for i in tl.static_range(COUNT):
        scaled += (x[i] * factor,)
    return scaled


@triton.jit
def product(x, y, start, COUNT: tl.constexpr):
    """``start`` + x[0] * y[0] + x[1] * y[1] + ..."""
    for i in tl.static_range(COUNT):
        start += x[i] * y[i]
    return start


@triton.jit
def add_scaled(sums, x, y, COUNT: tl.constexpr):
    """``sums`` and ``x`` times each of ``y``."""
    new_sums = ()
    for i in tl.static_range(COUNT):
        new_sums += (sums[i] + x * y[i],)
    return new_sums


@triton.jit
def part_of(x, FIRST: tl.constexpr, COUNT: tl.constexpr):
    part = ()
    for i in tl.static_range(COUNT):
        part += (x[FIRST + i],)
    return part


@triton.jit
def shift(x, last, COUNT: tl.constexpr):
    """All of the COUNT but the first, and ``last`` behind them."""
    shifted = part_of(x, 1, COUNT - 1)
    shifted += (last,)
    return shifted
