"""Attention layers of a head as one step, for one map or for all levels of an FPN."""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import allows
from .calls import AttentionCall, GroupNormCall, Levels
from .checks import check_attention
from .functional import cast_embeddings, cast_for_autocast
from .group_norm import served_call
from .operator import autocast_is_on, needs_dispatcher, once_differentiable, without_autocast
from .steps import project, projection_gradients
from .triton import attention, group_norm, refuses_tensor


class NormedLayer(NamedTuple):
    """What a layer of a head computes with: x + attention(projection(relu(group_norm(x)))).

    Its tensors are scale and shift of the norm, weight and bias of the projection, and the
    embeddings. A predictor, which may be the last, has no heads; it is the projection alone.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    weight: Tensor
    bias: Tensor | None
    rel_rows: Tensor | None
    rel_cols: Tensor | None
    num_groups: int
    eps: float
    num_heads: int | None
    kernel_size: int

    def with_casts(self) -> "NormedLayer":
        """As autocast wants its tensors."""
        weight, bias = cast_for_autocast(self.weight, self.bias)
        rel_rows, rel_cols = cast_embeddings(weight, self.rel_rows, self.rel_cols)
        return self._replace(weight=weight, bias=bias, rel_rows=rel_rows, rel_cols=rel_cols)

    def has_norm_for(self, x: Tensor, levels: Levels | None) -> bool:
        """Whether the norm's kernels serve it, and nobody wants to see operators."""
        norm = (self.num_groups, self.norm_weight, self.norm_bias, self.eps)
        return served_call(x, *norm, levels) is not None and not needs_dispatcher(self[:_TENSORS])

    def has_attention_for(self, x: Tensor, levels: Levels | None) -> bool:
        """Whether the attention's kernels serve it, if it is no predictor."""
        # Only autocast has weights of another dtype; without it torch is to say so.
        if x.dtype != self.weight.dtype and not autocast_is_on(x.device.type):
            return False
        if self.num_heads is None:
            return True
        if self.weight.shape[0] != 3 * x.shape[1]:
            return False
        # Queries, keys and values will be of the shape of x and the dtype of the weight.
        some = x
        if x.dtype != self.weight.dtype:
            some = self.weight.new_empty(1).expand(x.shape)
        call = self.attention((some, some, some), levels)
        check_attention(call)  # here, because kernels trust it
        return attention.refuses(call) is None

    def normed(
        self, x: Tensor, levels: Levels | None, statistics: Tensor | None
    ) -> tuple[Tensor, GroupNormCall]:
        """The normed map, and the norm's call with its statistics."""
        assert self.norm_weight is not None
        assert self.norm_bias is not None
        norm = (self.norm_weight, self.norm_bias, statistics, self.num_groups, self.eps)
        call = GroupNormCall(x, *norm, levels)
        normed, statistics = group_norm.forward(call)
        # Under autocast the map may be wider than the weights.
        return normed.to(self.weight.dtype), call._replace(statistics=statistics)

    def attention(self, maps: Iterable[Tensor], levels: Levels | None) -> AttentionCall:
        """Of queries, keys and values."""
        assert self.num_heads is not None
        query, key, value = maps
        options = (self.num_heads, self.kernel_size, levels)
        return AttentionCall(query, key, value, self.rel_rows, self.rel_cols, *options)


class _Kept(NamedTuple):
    """What a layer keeps: of the norm its statistics; of the attention, if it has one, the
    log-sum-exp and the output."""

    statistics: Tensor
    logsumexp: Tensor | None
    output: Tensor | None


# At the beginning of a layer, and of what is kept of it.
_TENSORS, _KEPT = 6, len(_Kept._fields)


def normed_attention(
    x: Tensor, layers: Sequence[NormedLayer], levels: Levels | None = None
) -> Tensor | None:
    """x + projected_attention(relu(group_norm(x))), layer upon layer, and perhaps a predictor.

    For the backward ``x`` is kept, and what each attention made of its own input; the inputs are
    added up again, which spares a map a layer.

    Args:
        x (Tensor[N, C, H, W]): what the first layer normalises, and adds to.
        layers (list[NormedLayer]): in their order.
        levels (tuple[tuple[int, int], ...] or None): heights and widths of the maps that ``x``
            holds, packed by :func:`pack_levels`; statistics and windows stay within each.

    Returns:
        Tensor or None: None if there are no kernels for it, or if somebody wants to see operators.

    Raises:
        ValueError: for a predictor that is not the last; for shapes that do not fit together.
    """
    if any(layer.num_heads is None for layer in layers[:-1]):
        raise ValueError("Only the last layer may be a predictor, which has num_heads=None.")
    if not all(layer.has_norm_for(x, levels) for layer in layers):
        return None
    layers = [layer.with_casts() for layer in layers]
    if not all(layer.has_attention_for(x, levels) for layer in layers):
        return None
    if not torch.is_grad_enabled():
        for layer in layers:
            x, _ = _forward(layer, x, levels, keep_output=False)
        return x
    tensors = [tensor for layer in layers for tensor in layer[:_TENSORS]]
    return _NormedAttention.apply(x, levels, [layer[_TENSORS:] for layer in layers], *tensors)


class _NormedAttention(torch.autograd.Function):
    """Kernels compute all of it, in the backward too, whatever backend was asked for in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, levels: Levels | None, options: Sequence[tuple], *tensors: Any
    ) -> Tensor:
        ctx.levels, ctx.options = levels, options
        all_kept: list[Tensor | None] = []
        result = x
        for layer in _layers(tensors, options):
            result, kept = _forward(layer, result, levels, keep_output=True)
            all_kept += kept
        ctx.save_for_backward(x, *tensors, *all_kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors  # once: hooks on what is kept may forbid a second time
        end = _TENSORS * len(ctx.options)
        layers, tensors_needed = _layers(saved[:end], ctx.options), ctx.needs_input_grad[3:]
        kept = [_Kept(*saved[i : i + _KEPT]) for i in range(end, len(saved), _KEPT)]
        # A hook on what is kept may have lost the format.
        summands = [
            x.contiguous(memory_format=torch.channels_last)
            for x in (x, *(layer.output for layer in kept[:-1]))
        ]
        # As the forward added them up, to the last bit.
        inputs = list(accumulate(summands, torch.add))
        grads: list[Tensor | None] = []
        for index in reversed(range(len(layers))):
            first = _TENSORS * index
            needed = tensors_needed[first : first + _TENSORS]
            grad, *of_tensors = _backward(
                layers[index], inputs.pop(), kept[index], grad, ctx.levels, needed
            )
            grads = of_tensors + grads
        return grad, None, None, *grads


def _forward(
    layer: NormedLayer, x: Tensor, levels: Levels | None, *, keep_output: bool
) -> tuple[Tensor, _Kept]:
    normed, norm = layer.normed(x, levels, None)
    projected = project(normed, layer.weight, layer.bias)
    assert norm.statistics is not None
    if layer.num_heads is None:
        return projected, _Kept(norm.statistics, None, None)
    call = layer.attention(projected.chunk(3, dim=1), levels)
    result, *kept = attention.add_to(x, call, keep_output)
    return result, _Kept(norm.statistics, *kept)


def _backward(
    layer: NormedLayer,
    x: Tensor,
    kept: _Kept,
    grad: Tensor,
    levels: Levels | None,
    needed: Sequence[bool],
) -> tuple[Any, ...]:
    """Gradients of x and of the layer's tensors; of weight and bias where they are needed."""
    normed, norm = layer.normed(x, levels, kept.statistics)
    of_projection, grad_residual = grad, None
    of_embeddings: list[Any] = []
    if kept.logsumexp is not None and kept.output is not None:
        maps = project(normed, layer.weight, layer.bias).chunk(3, dim=1)
        grad_output, grad_residual = grad.to(kept.output.dtype), grad
        of_projection, *of_embeddings = attention.backward(
            layer.attention(maps, levels), grad_output, kept.output, kept.logsumexp
        )
    grad_normed, *of_weights = projection_gradients(
        of_projection, normed, layer.weight, [True, *needed[2:4]]
    )
    assert grad_normed is not None
    grad_input, of_norm = group_norm.backward(norm, grad_normed.to(x.dtype), grad_residual)
    of_norm = of_norm.to(norm.weight.dtype)
    return grad_input, *of_norm.unbind(), *of_weights, *(of_embeddings or (None, None))


def _layers(tensors: Sequence[Any], options: Sequence[tuple]) -> list[NormedLayer]:
    """From the tensors of all, one behind the other, and the numbers of each."""
    starts = range(0, len(tensors), _TENSORS)
    return [NormedLayer(*tensors[i : i + _TENSORS], *rest) for i, rest in zip(starts, options)]


def can_pack_levels(maps: Sequence[Tensor]) -> bool:
    """Whether there are kernels for such maps, packed by :func:`pack_levels`."""
    first = maps[0]
    if needs_dispatcher(tuple(maps)) or not allows("triton") or refuses_tensor(first) is not None:
        return False
    alike = (first.dtype, first.device, first.shape[:2])
    return all((x.dtype, x.device, x.shape[:2]) == alike for x in maps)


def pack_levels(maps: Sequence[Tensor]) -> tuple[Tensor, Levels]:
    """Several maps (N, C, H, W) as one (N, C, 1, positions), channels last; and their sizes."""
    packed = _concatenate(*(x.permute(0, 2, 3, 1).flatten(1, 2) for x in maps))
    return packed.mT.unsqueeze(2), tuple((x.shape[2], x.shape[3]) for x in maps)


@without_autocast
def _concatenate(*rows: Tensor) -> Tensor:
    return torch.cat(rows, dim=1)


def unpack_levels(packed: Tensor, levels: Levels) -> list[Tensor]:
    """The maps that :func:`pack_levels` packed, or what became of them; they share memory."""
    return list(_UnpackLevels.apply(packed, levels))


class _UnpackLevels(torch.autograd.Function):
    """Gradients are packed as well; torch would add up one padded with zeros for each map."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, levels: Levels) -> tuple[Tensor, ...]:
        n, channels, _, _ = packed.shape
        of_image, of_channel, _, of_position = packed.stride()
        maps, start = [], packed.storage_offset()
        for height, width in levels:
            strides = (of_image, of_channel, width * of_position, of_position)
            # No views: those that a function returns must not be changed in place.
            part = packed.new_empty(0)
            part.set_(packed.untyped_storage(), start, (n, channels, height, width), strides)
            maps.append(part)
            start += height * width * of_position
        return tuple(maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return pack_levels(grads)[0], None
