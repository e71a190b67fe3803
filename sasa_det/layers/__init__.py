"""Attention layers as torch modules. Imports torch and nothing else."""

from .local_attention import LocalSelfAttention2d, PreActivationSelfAttention2d
from .recording import attention_layers, record_attention
from .stem_attention import StemSelfAttention2d

__all__ = [
    "LocalSelfAttention2d",
    "PreActivationSelfAttention2d",
    "StemSelfAttention2d",
    "attention_layers",
    "record_attention",
]
