"""How a bottleneck ends: a projection, a residual and ReLU."""

from torch import Tensor

from . import steps
from .backends import is_one_operator
from .calls import ResidualCall
from .functional import is_inference
from .registration import residual_projection_op


def residual_projection(
    residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """relu(residual + conv2d(x, weight, bias)) of a 1x1 convolution.

    Without gradients the native kernels add and rectify where they write the product, in float32
    and channels_last: the sum needs no map, and no pass, of its own.

    Args:
        residual (Tensor[N, C, H, W]): stays as it is.
        x (Tensor[N, C_in, H, W]): what is projected.
        weight (Tensor[C, C_in, 1, 1]), bias (Tensor[C] or None): of the projection.

    Returns:
        Tensor[N, C, H, W].
    """
    call = ResidualCall(residual, x, weight, bias)
    if is_inference(x) and is_one_operator("residual_projection", call):
        return residual_projection_op(*call)
    return steps.residual_projection(call)
