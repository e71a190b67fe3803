"""The operators on CUDA, in Triton, which itself is imported when the first kernel is launched."""

from .launch import unavailable

__all__ = ["unavailable"]
