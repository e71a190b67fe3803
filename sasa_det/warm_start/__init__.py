"""A start for the attention models from a trained convolutional one, without ImageNet training."""

from .checkpoints import Source, read_checkpoint, write_checkpoint
from .convert import Conversion, convert
from .distill import LayerError, distill
from .images import find_images

__all__ = [
    "Conversion",
    "LayerError",
    "Source",
    "convert",
    "distill",
    "find_images",
    "read_checkpoint",
    "write_checkpoint",
]
