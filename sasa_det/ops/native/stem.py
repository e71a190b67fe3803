"""``stem_attention_pooled`` on the CPU, in C."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..calls import StemCall, empty_pooled
from . import library

# Tasks for each image; their partial sums are added up in this order.
_BANDS = 16


def refuses(call: StemCall) -> str | None:
    return library.refuses(call.image)


def forward(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    image, weights = call.image.float(), _fold(call)
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
    image, weights = call.image.float(), _fold(call)
    grad_maximum = grad_maximum.float()
    grad_sums = torch.stack([grad_total, grad_square_total]).float()
    parts = image.new_empty(image.shape[0] * _BANDS, sum(x.numel() for x in weights))
    arguments = _arguments(call, image, weights)
    arguments.grad_maximum = library.Map.of(grad_maximum)
    arguments.grad_sum, arguments.grad_square_sum = (x.data_ptr() for x in grad_sums)
    arguments.grad_weights = parts.data_ptr()
    library.run("sasa_det_stem_backward", arguments)
    flat = parts.sum(dim=0).split([x.numel() for x in weights])
    grads = _FoldedWeights(*(x.view_as(weight) for x, weight in zip(flat, weights)))
    # Contiguous, as the fake implementation promises.
    return [x.to(call.image.dtype).contiguous() for x in _unfold(call, grads)]


class _FoldedWeights(NamedTuple):
    """The weights as the kernel meets them: with so few channels, q . k is x . content . x."""

    content: Tensor  # (heads, C_in of the query, C_in of the key)
    rel_rows: Tensor  # (heads, 2 * block_size - 1, C_in)
    rel_cols: Tensor
    value_weights: Tensor  # (heads, positions, head_dim, C_in)


def _fold(call: StemCall) -> _FoldedWeights:
    query, key, value = _by_head(call)
    relative = [
        query.new_zeros(call.num_heads, 2 * call.mixture.shape[-1] - 1, query.shape[-1])
        if embedding is None
        else torch.einsum("hdi,hod->hoi", half, embedding.float())
        for half, embedding in zip(query.chunk(2, dim=1), (call.rel_rows, call.rel_cols))
    ]
    mixture = call.mixture.float().flatten(1)
    folded = (
        torch.einsum("hdi,hdj->hij", query, key),
        *relative,
        torch.einsum("mp,mhdi->hpdi", mixture, value),
    )
    return _FoldedWeights(*(x.contiguous() for x in folded))


def _unfold(call: StemCall, grads: _FoldedWeights) -> list[Tensor]:
    """The gradients of the call's tensors but the image; the backward of :func:`_fold`."""
    query, key, value = _by_head(call)
    grad_query = torch.einsum("hij,hdj->hdi", grads.content, key)
    grad_key = torch.einsum("hij,hdi->hdj", grads.content, query)
    grad_embeddings = []
    for embedding, grad, half, grad_half in zip(
        (call.rel_rows, call.rel_cols), grads[1:3], query.chunk(2, 1), grad_query.chunk(2, 1)
    ):
        if embedding is not None:
            grad_half += torch.einsum("hoi,hod->hdi", grad, embedding.float())
            grad_embeddings.append(torch.einsum("hoi,hdi->hod", grad, half))
    mixture = call.mixture.float().flatten(1)
    grad_value = torch.einsum("hpdi,mp->mhdi", grads.value_weights, mixture)
    grad_mixture = torch.einsum("hpdi,mhdi->mp", grads.value_weights, value)
    return [
        grad_query.flatten(0, 1),
        grad_key.flatten(0, 1),
        grad_value.flatten(1, 2),
        grad_mixture.view_as(call.mixture),
        *grad_embeddings,
    ]


def _by_head(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    query, key = (
        x.float().unflatten(0, (call.num_heads, -1)) for x in (call.query_weight, call.key_weight)
    )
    return query, key, call.value_weights.float().unflatten(1, (call.num_heads, -1))


def _arguments(call: StemCall, image: Tensor, weights: _FoldedWeights) -> library.StemArguments:
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
