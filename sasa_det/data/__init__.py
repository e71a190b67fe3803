"""Data: the built-in dataset, the training augmentation, checks before a run starts."""

from .checks import check_datasets
from .digits import register_digits
from .loader import TrainLoader
from .mapper import build_train_mapper

__all__ = ["TrainLoader", "build_train_mapper", "check_datasets", "register_digits"]
