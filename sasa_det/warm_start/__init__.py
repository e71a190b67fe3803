"""A start for the attention models from a trained convolutional one, without ImageNet training."""

from .checkpoints import Source, read_checkpoint
from .convert import Conversion, convert
from .distill import LayerError, distill
from .images import find_images
from .norms import measure_norms
from .teacher import build_teacher

__all__ = [
    "Conversion",
    "LayerError",
    "Source",
    "build_teacher",
    "convert",
    "distill",
    "find_images",
    "measure_norms",
    "read_checkpoint",
]
