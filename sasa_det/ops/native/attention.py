"""``local_attention`` on the CPU, in C."""

import torch
from torch import Tensor

from ..calls import AttentionCall, empty_gradient
from . import library


def refuses(call: AttentionCall) -> str | None:
    return library.refuses(call.query)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    n, _, height, width = call.query.shape
    output = torch.empty_like(call.query)
    shape = (n, call.num_heads, height, width)
    logsumexp = call.query.new_empty(shape, dtype=torch.float32)
    arguments, _embeddings = _arguments(call, logsumexp)
    arguments.output = library.Map.of(output)
    library.run("sasa_det_attention_forward", arguments)
    return output, logsumexp


def backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor | None, logsumexp: Tensor
) -> list[Tensor]:
    """``output`` is not needed: the kernel has all weights of a position at hand at once."""
    arguments, _embeddings = _arguments(call, logsumexp)
    grads = [empty_gradient(call, torch.float32)]
    arguments.grad_output = library.Map.of(grad_output)
    arguments.grad_query, arguments.grad_key, arguments.grad_value = map(
        library.Map.of, grads[0].chunk(3, dim=1)
    )
    if call.rel_rows is not None:
        # Each task adds up its own part, so that the sum does not depend on who is first.
        shape = (call.query.shape[0] * arguments.bands, 2, *call.rel_rows.shape)
        parts = call.query.new_zeros(shape, dtype=torch.float32)
        arguments.grad_embeddings = parts.data_ptr()
    library.run("sasa_det_attention_backward", arguments)
    if call.rel_rows is not None:
        grads += [parts[:, axis].sum(dim=0) for axis in (0, 1)]
    return [grad.to(call.query.dtype) for grad in grads]


def _arguments(
    call: AttentionCall, logsumexp: Tensor
) -> tuple[library.AttentionArguments, list[Tensor | None]]:
    """What the library is called with, and the embeddings that it points to."""
    n, channels, height, width = call.query.shape
    embeddings = [
        x if x is None else x.to(torch.float32).contiguous() for x in (call.rel_rows, call.rel_cols)
    ]
    rel_rows, rel_cols = (None if x is None else x.data_ptr() for x in embeddings)
    arguments = library.AttentionArguments(
        batch=n,
        heads=call.num_heads,
        head_dim=channels // call.num_heads,
        height=height,
        width=width,
        kernel_size=call.kernel_size,
        bands=_bands(n * call.num_heads, height, call.kernel_size),
        query=library.Map.of(call.query),
        key=library.Map.of(call.key),
        value=library.Map.of(call.value),
        rel_rows=rel_rows,
        rel_cols=rel_cols,
        logsumexp=logsumexp.data_ptr(),
    )
    return arguments, embeddings


def _bands(planes: int, height: int, kernel_size: int) -> int:
    """Into how many bands a plane is cut, so that there are tasks for all threads.

    A band's window reaches into its neighbours, which the backward computes twice: no band is lower
    than two windows.
    """
    wanted = -(-2 * torch.get_num_threads() // max(planes, 1))
    return max(1, min(wanted, height // (2 * kernel_size)))
