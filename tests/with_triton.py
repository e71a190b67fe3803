"""What the tests of the Triton kernels share: on CUDA, or else in Triton's interpreter."""

import pytest
import torch

from sasa_det.ops import available_backends, use_backend
from sasa_det.ops.triton.launch import interpreted

UNAVAILABLE = available_backends()["triton"]
DEVICE = "cpu" if interpreted() else "cuda"
# Relative to the norm of the exact result.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture
def backend():
    if UNAVAILABLE:
        pytest.skip("without CUDA these run in the subprocess of test_in_the_interpreter")
    with use_backend("triton"):
        yield


def on_device(inputs):
    tensors = [None if x is None else x.detach().to(DEVICE).requires_grad_() for x in inputs]
    return tensors, [x for x in tensors if x is not None]
