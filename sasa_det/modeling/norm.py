"""Norms: the one in front of attention, batch norm of the pooled stem, batch norm over CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import BatchNorm2d, FrozenBatchNorm2d, get_norm
from detectron2.utils.comm import get_world_size
from fvcore.nn.distributed import differentiable_all_gather, differentiable_all_reduce
from torch import Tensor, nn

from sasa_det.layers.local_attention import has_hooks
from sasa_det.ops.functional import is_inference


def attention_norm(norm: str, channels: int) -> nn.Module:
    """detectron2's norm of this name; GN where the name is empty.

    Attention without one in front does not learn here (see ``PreActivationSelfAttention2d``).

    Raises:
        ValueError: for channels that group norm's 32 groups do not divide.
    """
    norm = norm or "GN"
    check_norm(norm, channels, "MODEL.FPN.OUT_CHANNELS")
    return get_norm(norm, channels)


def check_norm(norm: str, channels: int, key: str) -> None:
    """Raises ValueError for channels, those of ``key``, that group norm's 32 do not divide."""
    if norm == "GN" and channels % 32:
        raise ValueError(f"Group norm needs a multiple of 32 channels, but {key} is {channels}.")


def is_batch_norm(norm: nn.Module) -> bool:
    """Whether it is a batch norm that keeps running statistics, and no more than that."""
    # Exactly these: detectron2's NaiveSyncBatchNorm, a subclass, averages in its own way.
    kinds = (nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm, CPUSyncBatchNorm, FrozenBatchNorm2d)
    return type(norm) in kinds and norm.running_mean is not None


def uses_running_statistics(norm: Any) -> bool:
    """Whether a batch norm normalises by these now, and not by those of its input."""
    return isinstance(norm, FrozenBatchNorm2d) or not norm.training


def folds(norm: Any, x: Tensor) -> bool:
    """Whether what computes the input of a norm from ``x`` is to scale and shift it instead.

    That is in evaluation on the CPU, in float32, without gradients; and not in a trace or an
    exported program, which shows the norm.
    """
    if not is_batch_norm(norm) or not uses_running_statistics(norm) or has_hooks(norm):
        return False
    fits = x.device.type == "cpu" and x.dtype == norm.running_var.dtype == torch.float32
    return fits and is_inference(x)


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """(C,) each: what a batch norm multiplies its input by and adds, by its running statistics."""
    scale = (norm.running_var + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def fold(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with the batch norm behind it in them, in its dtype."""
    scale, shift = scale_and_shift(norm)
    shift = shift if bias is None else shift + bias * scale
    return (weight * scale[:, None, None, None]).to(weight.dtype), shift.to(weight.dtype)


def batch_norm_of_maximum(
    norm: Any, maximum: Tensor, total: Tensor, square_total: Tensor, count: int
) -> Tensor:
    """The maximum of what batch norm makes of a map, from the maximum of the map.

    A norm with a negative weight turns a maximum into a minimum: such channels must come negated.

    Args:
        norm (nn.Module): batch norm or frozen batch norm; running statistics are updated as it
            would do.
        maximum (Tensor[N, C, H', W']): pooled in some way.
        total, square_total (Tensor[C]): the sum of the map and of its squares, float32 or float64.
            The variance is as accurate as their difference: the map's mean must not be hundreds of
            times its standard deviation.
        count (int): positions of the map that were summed.
    """
    sign = channel_sign(norm)
    weight = None if norm.weight is None else norm.weight * sign
    if uses_running_statistics(norm):
        mean = sign.to(norm.running_mean.dtype) * norm.running_mean
        return F.batch_norm(maximum, mean, norm.running_var, weight, norm.bias, eps=norm.eps)
    moments = torch.cat([total, square_total, total.new_tensor([count])])
    if isinstance(norm, (nn.SyncBatchNorm, CPUSyncBatchNorm)) and get_world_size() > 1:
        moments = differentiable_all_reduce(moments)
    total, square_total, positions = moments.split([len(total), len(total), 1])
    mean = total / positions
    variance = (square_total / positions - mean.square()).clamp(min=0)
    _update_running_statistics(norm, sign * mean, variance * positions / (positions - 1).clamp(1))
    scale = (variance + norm.eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if norm.bias is None else norm.bias - mean * scale
    result = maximum * scale[:, None, None] + shift[:, None, None]
    return result.to(maximum.dtype)


def channel_sign(norm: Any) -> Tensor:
    """-1 for the channels in which a norm turns a maximum into a minimum, 1 for all others."""
    if norm.weight is None:
        return torch.ones_like(norm.running_mean)
    # Not sign(): a weight of zero is to have a gradient.
    return torch.where(norm.weight.detach() < 0, -1.0, 1.0).to(norm.weight.dtype)


@torch.no_grad()
def _update_running_statistics(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.num_batches_tracked += 1
    momentum = norm.momentum
    if momentum is None:  # a plain average over all batches
        momentum = 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_(variance.to(norm.running_var.dtype), momentum)


class CPUSyncBatchNorm(nn.BatchNorm2d):
    """Synchronised batch norm for processes on CPUs, which torch's own refuses.

    The statistics are those of all positions of all processes, as if one process had them all.
    It is no subclass of torch's, because DistributedDataParallel refuses those as well.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or get_world_size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        count = torch.full_like(mean, x.numel() / x.shape[1])
        moments = torch.stack(differentiable_all_gather(torch.stack([mean, variance, count])))
        means, variances, counts = moments.unbind(dim=1)
        total = counts.sum(dim=0)
        share = counts / total
        mean = (share * means).sum(dim=0)
        variance = (share * (variances + (means - mean).square())).sum(dim=0)
        _update_running_statistics(self, mean, variance * total / (total - 1).clamp(1))
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        return (x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


def sync_batch_norm_on_cpu(model: nn.Module) -> nn.Module:
    """The model with each of its ``SyncBatchNorm`` replaced by one that works on CPUs, in place."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.SyncBatchNorm:
                norm = CPUSyncBatchNorm(child.num_features, child.eps, child.momentum)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.train(child.training))
    return model
