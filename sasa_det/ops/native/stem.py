"""``stem_attention_pooled`` on the CPU, in C."""

import torch
from torch import Tensor

from ..calls import StemCall, empty_pooled
from ..folded_stem import FoldedWeights, fold, unfold
from . import library

# Tasks for each image; their partial sums are added up in this order.
_BANDS = 16


def refuses(call: StemCall) -> str | None:
    return library.refuses(call.image)


def forward(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    image, weights = call.image.float(), fold(call)
    maximum = empty_pooled(call).float()
    sums = image.new_empty(len(image) * _BANDS, 2, maximum.shape[1])
    arguments = _arguments(call, image, weights)
    arguments.maximum = library.Map.of(maximum)
    arguments.sums = sums.data_ptr()
    library.run("sasa_det_stem_forward", arguments)
    total, square_total = sums.sum(dim=0, dtype=torch.float64).float().unbind()
    return maximum.to(call.image.dtype), total, square_total.clone()


def backward(
    call: StemCall, grad_maximum: Tensor, grad_total: Tensor, grad_square_total: Tensor
) -> list[Tensor]:
    image, weights = call.image.float(), fold(call)
    grad_maximum = grad_maximum.float()
    grad_sums = torch.stack([grad_total, grad_square_total]).float()
    parts = image.new_empty(image.shape[0] * _BANDS, sum(x.numel() for x in weights))
    arguments = _arguments(call, image, weights)
    arguments.grad_maximum = library.Map.of(grad_maximum)
    arguments.grad_sum, arguments.grad_square_sum = (x.data_ptr() for x in grad_sums)
    arguments.grad_weights = parts.data_ptr()
    library.run("sasa_det_stem_backward", arguments)
    flat = parts.sum(dim=0).split([x.numel() for x in weights])
    return unfold(call, FoldedWeights(*(x.view_as(weight) for x, weight in zip(flat, weights))))


def _arguments(call: StemCall, image: Tensor, weights: FoldedWeights) -> library.StemArguments:
    """What the library is called with; it points to ``image`` and ``weights``."""
    n, in_channels, height, width = image.shape
    return library.StemArguments(
        batch=n,
        in_channels=in_channels,
        height=height,
        width=width,
        heads=call.num_heads,
        head_dim=call.query_weight.shape[0] // call.num_heads,
        block_size=call.mixture.shape[-1],
        bands=_BANDS,
        image=library.Map.of(image),
        **{name: weight.data_ptr() for name, weight in weights._asdict().items()},
    )
