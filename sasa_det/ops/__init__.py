"""The attention operators. Imports torch and nothing else."""

from .backends import available_backends, use_backend
from .functional import (
    local_attention,
    local_attention_weights,
    stem_attention,
    stem_attention_pooled,
    stem_attention_weights,
)
from .group_norm import group_norm_relu
from .normed import NormedLayer, can_pack_levels, normed_attention, pack_levels, unpack_levels
from .projected import projected_attention
from .residual import residual_projection

__all__ = [
    "NormedLayer",
    "available_backends",
    "can_pack_levels",
    "group_norm_relu",
    "local_attention",
    "local_attention_weights",
    "normed_attention",
    "pack_levels",
    "projected_attention",
    "residual_projection",
    "stem_attention",
    "stem_attention_pooled",
    "stem_attention_weights",
    "unpack_levels",
    "use_backend",
]
