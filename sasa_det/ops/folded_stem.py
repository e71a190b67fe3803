"""The stem's parameters for images of few channels, folded into what meets the pixels themselves.

With the pixels x, a logit is x_i^T (Wq^T Wk) x_j + x_i^T R_ij, R_ij being the query projection of
the embedding of the pair: one half of it is its row's and one its column's, and so is its logit.
Values are linear in the weights, so the projections that are mixed become one for each position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .calls import StemCall


class FoldedWeights(NamedTuple):
    """The weights as the kernels meet them, in float32."""

    content: Tensor  # (heads, C_in of the query, C_in of the key)
    rel_rows: Tensor  # (heads, 2 * block_size - 1, C_in)
    rel_cols: Tensor
    value_weights: Tensor  # (heads, positions, head_dim, C_in)


def fold(call: StemCall) -> FoldedWeights:
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
    return FoldedWeights(*(x.contiguous() for x in folded))


def unfold(call: StemCall, grads: FoldedWeights) -> list[Tensor]:
    """The gradients of the call's tensors but the image, in its dtype: the backward of ``fold``."""
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
    unfolded = [
        grad_query.flatten(0, 1),
        grad_key.flatten(0, 1),
        grad_value.flatten(1, 2),
        grad_mixture.view_as(call.mixture),
        *grad_embeddings,
    ]
    # Contiguous, as the fake implementation promises.
    return [x.to(call.image.dtype).contiguous() for x in unfolded]


def _by_head(call: StemCall) -> tuple[Tensor, Tensor, Tensor]:
    query, key = (
        x.float().unflatten(0, (call.num_heads, -1)) for x in (call.query_weight, call.key_weight)
    )
    return query, key, call.value_weights.float().unflatten(1, (call.num_heads, -1))
