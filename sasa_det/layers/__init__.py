"""Attention layers as torch modules. Imports torch and nothing else."""

from .local_attention import LocalSelfAttention2d, PreActivationSelfAttention2d
from .stem_attention import StemSelfAttention2d

__all__ = ["LocalSelfAttention2d", "PreActivationSelfAttention2d", "StemSelfAttention2d"]
