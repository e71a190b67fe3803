"""``residual_projection`` on the CPU, in C: residual and ReLU where the product is written."""

import torch
from torch import Tensor

from ..calls import ResidualCall
from . import library


def refuses(call: ResidualCall) -> str | None:
    """What is refused goes to a convolution and a sum, wrong arguments as well."""
    residual, x, weight, bias = call
    for tensor in call:
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device != x.device):
            return "it computes in float32, on one device"
    fits = residual.dim() == x.dim() == 4 and weight.shape == (residual.shape[1], x.shape[1], 1, 1)
    fits = fits and residual.shape[::2] == x.shape[::2] and residual.shape[3] == x.shape[3]
    fits = fits and weight.numel() > 0
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        return "the shapes of the tensors do not fit together"
    if not residual.is_contiguous(memory_format=torch.channels_last):
        return "it adds to maps in channels_last"
    return library.refuses(x)


def forward(call: ResidualCall) -> Tensor:
    output = torch.empty_like(call.residual)
    n, out_channels, height, width = output.shape
    x = call.x.contiguous(memory_format=torch.channels_last)
    weight = call.weight.flatten(1).contiguous()
    bias = None if call.bias is None else call.bias.contiguous()
    arguments = library.ResidualArguments(
        positions=n * height * width,
        in_channels=x.shape[1],
        out_channels=out_channels,
        input=x.data_ptr(),
        residual=call.residual.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        output=output.data_ptr(),
    )
    library.run("sasa_det_residual", arguments)
    return output
