"""The operators on the CPU, in C: csrc/ has the kernels, the modules here call them."""

from .library import unavailable

__all__ = ["unavailable"]
