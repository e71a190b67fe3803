"""The attention operators. Imports torch and nothing else."""

from .functional import local_attention, local_attention_weights, stem_attention

__all__ = ["local_attention", "local_attention_weights", "stem_attention"]
