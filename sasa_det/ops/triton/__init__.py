"""The operators on CUDA, in Triton, which itself is imported when the first kernel is launched."""

from .launch import refuses_tensor, unavailable

__all__ = ["refuses_tensor", "unavailable"]
