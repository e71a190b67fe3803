"""``local_attention`` on CUDA, in Triton.

A program takes a tile of queries of one head and walks over its halo, the keys that any of them
sees, a few rows at a time: a small flash attention with an online softmax. Of the halo a query sees
only its own window, 49 of 160 keys at k = 7; but the products run on tensor cores, which beat
multiply-adds on the window alone by more than that, and each key is loaded 5 times instead of 49.
Narrow heads, of 2, 4 or 8 channels, which tensor cores are too deep for, have kernels of their own
for windows of 3x3 to 7x7, in narrow_kernels.py.

q . r has two factors, one of the query's position and the halo's row, one of its position and the
halo's column. Their sum, with minus infinity outside the window and the map, is what the product of
queries and keys starts from as its accumulator, so masks and embeddings cost next to nothing.

The backward computes the weights anew from the log-sum-exp, in two kernels without atomics: one
walks from queries over keys, for the gradients of queries and embeddings, one from keys over the
queries that see them; a third adds up those of the embeddings. Results do not change from run to
run. Those for narrow heads write the gradients of q . r, and a kernel more sums them up.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..calls import AttentionCall, empty_gradient, empty_logsumexp
from .launch import Launch, cdiv, next_power_of_2, on_device, refuses_tensor
from .tiles import is_narrow, level_table, num_tiles, options, tile_of, tiles_grid

# Programs that each sum the gradients of the embeddings over some tiles: enough to keep a GPU busy
# to the end, few enough that reading their sums again takes no time.
_SUMMING_PROGRAMS = 4096
# Beyond, a tile's registers no longer suffice.
_MAX_KERNEL_SIZE = 17
_MAX_HEAD_DIM = 64


def refuses(call: AttentionCall) -> str | None:
    reason = refuses_tensor(call.query)
    if reason is not None:
        return reason
    head_dim = call.query.shape[1] // call.num_heads
    if call.kernel_size > _MAX_KERNEL_SIZE or head_dim > _MAX_HEAD_DIM:
        return (
            f"its tiles fit windows up to {_MAX_KERNEL_SIZE} and heads up to {_MAX_HEAD_DIM} "
            f"channels, not kernel_size={call.kernel_size} with {head_dim} channels a head"
        )
    # Their gradients are parts of one map, as they are themselves if one projection made them.
    if max(3 * math.prod(call.query.shape[1:]), *map(_span, call[:3])) >= 2**31:
        return "it does not serve images whose queries, keys and values are 2 ** 31 numbers or more"
    return None


def _span(x: Tensor) -> int:
    """How far the last number of an image is from its first."""
    _, channels, height, width = x.shape
    _, of_channel, of_row, of_position = x.stride()
    return (channels - 1) * of_channel + (height - 1) * of_row + (width - 1) * of_position


def forward(call: AttentionCall) -> tuple[Tensor, Tensor]:
    logsumexp = empty_logsumexp(call.query, call.num_heads)
    given, call = call, _with_channels_last(call)
    output = torch.empty_like(call.query)
    with on_device(call.query):
        forward_launch(call, output, logsumexp).run()
    if call.query is not given.query:
        output = torch.empty_like(given.query).copy_(output)
    return output, logsumexp


def add_to(
    residual: Tensor, call: AttentionCall, keep_output: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of residual and output, the log-sum-exp, and the output if it is to be kept.

    The channels of the residual come last. The sum is of the wider dtype of the two.
    """
    logsumexp = empty_logsumexp(call.query, call.num_heads)
    call, residual = _with_channels_last(call), _channels_last(residual)
    dtype = torch.promote_types(residual.dtype, call.query.dtype)
    added_up = torch.empty_like(residual, dtype=dtype)
    output = torch.empty_like(residual, dtype=call.query.dtype) if keep_output else None
    with on_device(call.query):
        forward_launch(call, output, logsumexp, residual, added_up).run()
    return added_up, logsumexp, output


def backward(
    call: AttentionCall, grad_output: Tensor, output: Tensor | None, logsumexp: Tensor
) -> list[Tensor]:
    if output is None:
        output, _ = forward(call)
    given, call = call, _with_channels_last(call)
    output, grad_output = _channels_last(output), _channels_last(grad_output)
    grad_maps = empty_gradient(call)
    grad_query, grad_key, grad_value = grad_maps.chunk(3, dim=1)
    mean = torch.empty_like(logsumexp)
    partial_sums = new_partial_sums(call)
    embeddings = [x for x in (call.rel_rows, call.rel_cols) if x is not None]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in embeddings]
    with on_device(call.query):
        for launch in query_gradient_launches(
            call, grad_output, output, logsumexp, grad_query, mean, partial_sums
        ):
            launch.run()
        key_value_gradient_launch(call, grad_output, logsumexp, mean, grad_key, grad_value).run()
        if grads:
            embedding_gradient_launch(call, partial_sums, *grads).run()
    if call.query is not given.query:
        grad_maps = empty_gradient(given).copy_(grad_maps)
    return [grad_maps, *grads]


def _with_channels_last(call: AttentionCall) -> AttentionCall:
    """Read as they are, maps in the other format took four times as long; copies are cheaper."""
    query, key, value = map(_channels_last, call[:3])
    if _strides(key) != _strides(value):  # those of one projection have the same, as they should
        both = torch.cat([key, value], dim=1).contiguous(memory_format=torch.channels_last)
        key, value = both.chunk(2, dim=1)
    return call._replace(query=query, key=key, value=value)


def _channels_last(x: Tensor) -> Tensor:
    """(N, C, H, W) whose positions and channels can be walked over with two strides."""
    n, _, height, width = x.shape
    of_image, step = _strides(x)
    walkable = x.stride(1) == 1 and (height == 1 or x.stride(2) == width * step)
    # Of what is expanded, all numbers are one: the output is to be laid out in the same way.
    expanded = (n > 1 and of_image == 0) or (height * width > 1 and step < x.shape[1])
    # The kernels for narrow heads read bfloat16 two numbers at a time.
    even = x.dtype != torch.bfloat16 or not (x.data_ptr() % 4 or of_image % 2 or step % 2)
    if walkable and not expanded and even and step * height * width < 2**31:
        return x
    return x.clone(memory_format=torch.channels_last)


def _strides(x: Tensor) -> tuple[int, int]:
    """From image to image, and from position to position."""
    of_image, _, of_row, of_position = x.stride()
    # Of a dimension with one entry only, the stride may be anything.
    return of_image, of_position if x.shape[3] > 1 else of_row


def forward_launch(
    call: AttentionCall,
    output: Tensor | None,
    logsumexp: Tensor,
    residual: Tensor | None = None,
    added_up: Tensor | None = None,
) -> Launch:
    """Writes what is given of output and ``added_up``, whose strides are the same."""
    tile = tile_of(call)
    if is_narrow(tile):
        from .narrow_kernels import forward_kernel
    else:
        from .kernels import forward_kernel
    written = added_up if output is None else output
    assert written is not None
    arguments = _arguments(call, tile, output=written)
    arguments |= {"output": output, "logsumexp": logsumexp}
    arguments |= {"residual": residual, "added_up": added_up}
    arguments["residual_strides"] = None if residual is None else _strides(residual)
    given = options(tile, call.query.dtype, narrow_registers=128)
    if given["num_warps"] == 1 and call.query.dtype != torch.float32:
        given["maxnreg"] = 168  # for 12 warps on a multiprocessor; it would take up to 190
    return Launch(forward_kernel, tiles_grid(call, tile), arguments, tile, given)


def query_gradient_launches(
    call: AttentionCall,
    grad_output: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    grad_query: Tensor,
    mean: Tensor,
    partial_sums: Tensor,
) -> list[Launch]:
    """They write ``grad_query``, ``mean`` (as ``logsumexp``) and ``partial_sums``."""
    tile = tile_of(call)
    arguments = _arguments(
        call, tile, grad_output=grad_output, output=output, grad_query=grad_query
    )
    arguments |= {"logsumexp": logsumexp, "mean": mean, "partial_sums": partial_sums}
    arguments |= {"num_images": call.query.shape[0], "tiles": num_tiles(call, tile)}
    given = options(tile, call.query.dtype)
    summing_grid = (call.num_heads, partial_sums.shape[0])
    if not is_narrow(tile):
        from .backward_kernels import query_gradient_kernel

        chunks = cdiv(tile["BLOCK_H"] + call.kernel_size - 1, tile["CHUNK_H"])
        if tile["PRECISION"] == "tf32x3":
            given["num_warps"] = 2  # for twice as many registers
        tile = tile | {"CHUNKS": next_power_of_2(chunks)}
        return [Launch(query_gradient_kernel, summing_grid, arguments, tile, given)]
    from .narrow_backward_kernels import query_gradient_kernel, table_sums_kernel

    table = (call.query.shape[0], arguments["positions"], call.num_heads, 2 * tile["KERNEL_PAD"])
    arguments["grad_table"] = call.query.new_empty(table) if tile["RELATIVE"] else None
    launches = [Launch(query_gradient_kernel, tiles_grid(call, tile), arguments, tile, given)]
    if tile["RELATIVE"]:
        tile = tile | {"POSITIONS_AT_ONCE": 64}
        given = {"num_warps": 1, "num_stages": 3}
        launches.append(Launch(table_sums_kernel, summing_grid, arguments, tile, given))
    return launches


def key_value_gradient_launch(
    call: AttentionCall,
    grad_output: Tensor,
    logsumexp: Tensor,
    mean: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Launch:
    """Writes ``grad_key`` and ``grad_value``, whose strides are the same.

    Reads the ``mean`` of ``query_gradient_launches``.
    """
    tile = tile_of(call)
    if is_narrow(tile):
        from .narrow_backward_kernels import key_value_gradient_kernel
    else:
        from .backward_kernels import key_value_gradient_kernel
    arguments = _arguments(call, tile, grad_output=grad_output, grad_key=grad_key)
    arguments |= {"logsumexp": logsumexp, "mean": mean, "grad_value": grad_value}
    given = options(tile, call.query.dtype)
    return Launch(key_value_gradient_kernel, tiles_grid(call, tile), arguments, tile, given)


def embedding_gradient_launch(
    call: AttentionCall, partial_sums: Tensor, grad_rows: Tensor, grad_cols: Tensor
) -> Launch:
    """Writes ``grad_rows`` and ``grad_cols`` from the sums of ``query_gradient_launches``."""
    from .backward_kernels import embedding_gradient_kernel

    arguments = {
        "partial_sums": partial_sums,
        "grad_rows": grad_rows,
        "grad_cols": grad_cols,
        "programs": partial_sums.shape[0],
    }
    grid = (call.num_heads, 2 * call.kernel_size)
    tile = tile_of(call) | {"PROGRAMS_AT_ONCE": 64}
    given = {"num_warps": 4, "num_stages": 1}
    return Launch(embedding_gradient_kernel, grid, arguments, tile, given)


def _arguments(call: AttentionCall, tile: dict[str, Any], **maps: Tensor) -> dict[str, Any]:
    """Query, key, value and these maps with their strides, and what else all kernels take."""
    maps |= {"query": call.query, "key": call.key}
    strides = {f"{name}_strides": _strides(x) for name, x in maps.items()}
    embeddings = {
        name: None if x is None else x.contiguous()
        for name, x in (("rel_rows", call.rel_rows), ("rel_cols", call.rel_cols))
    }
    height, width = call.query.shape[2:] if call.levels is None else call.levels[0]
    geometry = {
        "levels": level_table(call, tile),
        "positions": call.query.shape[2] * call.query.shape[3],
        "height": height,
        "width": width,
    }
    return {**maps, "value": call.value, **strides, **embeddings, **geometry}


def new_partial_sums(call: AttentionCall) -> Tensor:
    """Room for the sums of the programs that add up the embeddings' gradients."""
    tile = tile_of(call)
    tiles = call.query.shape[0] * num_tiles(call, tile)
    programs = min(tiles, cdiv(_SUMMING_PROGRAMS, call.num_heads))
    shape = (programs, call.num_heads, 2 * call.kernel_size, tile["HEAD_DIM"] // 2)
    return call.query.new_empty(shape, dtype=torch.float32)
