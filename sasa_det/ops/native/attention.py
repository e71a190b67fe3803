"""``local_attention`` on the CPU, in C."""

import torch
from torch import Tensor

from ..calls import AttentionCall, ProjectedCall, empty_gradient, empty_logsumexp
from . import library


def refuses(call: AttentionCall) -> str | None:
    return call.refusal_of_levels() or library.refuses(call.query)


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    output = library.mapped(torch.empty_like(call.query))
    logsumexp = empty_logsumexp(output, call.num_heads)
    arguments, _embeddings = attention_arguments(call, output.shape, logsumexp)
    _set_maps(arguments, call)
    arguments.output = library.Map.of(output)
    library.run("sasa_det_attention_forward", arguments)
    return output, logsumexp


def backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor | None, logsumexp: Tensor
) -> list[Tensor]:
    """``output`` is not needed: the kernel has all weights of a position at hand at once."""
    arguments, _embeddings = attention_arguments(call, grad_output.shape, logsumexp)
    _set_maps(arguments, call)
    grad_maps = library.mapped(empty_gradient(call, torch.float32))
    arguments.grad_query, arguments.grad_key, arguments.grad_value = map(
        library.Map.of, grad_maps.chunk(3, dim=1)
    )
    grads = [grad_maps, *run_backward(arguments, call, grad_output)]
    embeddings = [x for x in call[3:5] if x is not None]
    return [grad.to(x.dtype) for grad, x in zip(grads, (call.query, *embeddings))]


def run_backward(
    arguments: library.AttentionArguments, call: AttentionCall | ProjectedCall, grad_output: Tensor
) -> list[Tensor]:
    """Fills the gradients that the arguments point to, and returns those of the embeddings."""
    arguments.grad_output = library.Map.of(grad_output)
    if call.rel_rows is None:
        library.run("sasa_det_attention_backward", arguments)
        return []
    # Each task adds up its own part, so that the sum does not depend on who is first.
    shape = (grad_output.shape[0] * arguments.bands, 2, *call.rel_rows.shape)
    parts = grad_output.new_zeros(shape, dtype=torch.float32)
    arguments.grad_embeddings = parts.data_ptr()
    library.run("sasa_det_attention_backward", arguments)
    return [parts[:, axis].sum(dim=0) for axis in (0, 1)]


def attention_arguments(
    call: AttentionCall | ProjectedCall, shape: torch.Size, logsumexp: Tensor
) -> tuple[library.AttentionArguments, list[Tensor | None]]:
    """What the library is called with but for the maps, and the embeddings that it points to.

    ``shape`` is that of the output.
    """
    n, channels, height, width = shape
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
        bands=number_of_bands(n * call.num_heads, height, call.kernel_size),
        rel_rows=rel_rows,
        rel_cols=rel_cols,
        logsumexp=logsumexp.data_ptr(),
    )
    return arguments, embeddings


def _set_maps(arguments: library.AttentionArguments, call: AttentionCall) -> None:
    arguments.query, arguments.key, arguments.value = map(library.Map.of, call[:3])


def number_of_bands(planes: int, height: int, kernel_size: int) -> int:
    """Into how many bands a plane is cut, so that there are tasks for all threads.

    A band's window reaches into its neighbours, which the backward computes twice: no band is lower
    than two windows.
    """
    wanted = -(-2 * torch.get_num_threads() // max(planes, 1))
    return max(1, min(wanted, height // (2 * kernel_size)))
