"""Data: the built-in dataset, the training augmentation, checks before a run starts."""

from .annotation_file import garbage_collection_off
from .checks import check_config_datasets, check_datasets
from .digits import register_digits
from .loader import TrainLoader
from .mapper import build_test_mapper, build_train_mapper

__all__ = [
    "TrainLoader",
    "build_test_mapper",
    "build_train_mapper",
    "check_config_datasets",
    "check_datasets",
    "garbage_collection_off",
    "register_digits",
]
