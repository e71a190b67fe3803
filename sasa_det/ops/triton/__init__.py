"""The operators on CUDA. Triton itself is imported when the first kernel is launched."""
