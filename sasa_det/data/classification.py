"""Images with labels, ImageNet's folders or CIFAR-10: the same batches after an interruption."""

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import InterpolationMode, v2

from .workers import TrainingDataLoader, UnusableImageError

FORMATS = ("folder", "cifar10")
_CIFAR10_SIZE = 32


class LabelledImages(Protocol):
    """What torchvision's classification datasets have in common."""

    classes: list[str]

    def __getitem__(self, index: int) -> tuple[Any, int]: ...
    def __len__(self) -> int: ...


def load_images(root: str, data_format: str) -> tuple[LabelledImages, LabelledImages]:
    """The images for training and those for validation, as PIL images with labels.

    Args:
        root (str): the folder with ``train/CLASS/`` and ``val/CLASS/``, or the one where CIFAR-10
            is, or is to be downloaded to.
        data_format (str): "folder" or "cifar10".

    Labels count the training's classes; ``val`` may lack some of them.

    Raises:
        FileNotFoundError: for what is missing, with the remedy.
        ValueError: for a class that only ``val`` has.
    """
    if data_format == "cifar10":
        return _load_cifar10(root)
    for split in ("train", "val"):
        folder = Path(root) / split
        if not folder.is_dir() or not any(path.is_dir() for path in folder.iterdir()):
            raise FileNotFoundError(
                f"{str(folder)!r} has no folders of images; --data must name a folder with "
                "train/CLASS/ and val/CLASS/ in it, as torchvision's ImageFolder wants them."
            )
    train = ImageFolder(str(Path(root) / "train"), loader=_read_image)
    val = ImageFolder(str(Path(root) / "val"), loader=_read_image, allow_empty=True)
    if not val.samples:
        raise FileNotFoundError(f"{val.root!r} has no images; validation needs some.")
    unknown = [name for name in val.classes if name not in train.class_to_idx]
    if unknown:
        raise ValueError(
            f"The class {unknown[0]!r} of {val.root} has no folder in {train.root}; validate on "
            "classes of the training only."
        )
    val.samples = [(path, train.class_to_idx[val.classes[i]]) for path, i in val.samples]
    return cast(LabelledImages, train), cast(LabelledImages, val)


def _load_cifar10(root: str) -> tuple[LabelledImages, LabelledImages]:
    try:
        train, val = (CIFAR10(root, train=is_train, download=True) for is_train in (True, False))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"CIFAR-10 is not in {root!r} and could not be downloaded ({error}); unpack "
            "cifar-10-python.tar.gz there."
        ) from error
    return cast(LabelledImages, train), cast(LabelledImages, val)


def _read_image(path: str) -> Any:
    try:
        return default_loader(path)
    except Exception as error:
        raise UnusableImageError.because_of(error, path) from error


def train_transform(data_format: str, size: int, min_crop: float) -> v2.Transform:
    """PIL image to uint8 tensor (3, size, size), RGB: a random cut, half of them mirrored.

    Args:
        data_format (str): CIFAR-10's images are shifted by up to 4 pixels, others cut as Inception
            does it.
        size (int): side of the result, in pixels.
        min_crop (float): the smallest part of the image's area that is cut out.
    """
    if data_format == "cifar10":
        cut = [v2.RandomCrop(_CIFAR10_SIZE, padding=4), v2.Resize(size)]
    else:
        cut = [v2.RandomResizedCrop(size, scale=(min_crop, 1.0))]
    return v2.Compose([*cut, v2.RandomHorizontalFlip(), v2.PILToTensor()])


def val_transform(data_format: str, size: int) -> v2.Transform:
    """PIL image to uint8 tensor (3, size, size), RGB: of folders' images the middle, 7/8 of it."""
    if data_format == "cifar10":
        return v2.Compose([v2.Resize(size), v2.PILToTensor()])
    resize = v2.Resize(size * 8 // 7, interpolation=InterpolationMode.BILINEAR)
    return v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


class TransformedImages(Dataset):
    """Images by index; what is random about the transform is drawn from the seed given with it.

    So an image comes out the same in any process and after any interruption.
    """

    def __init__(self, images: LabelledImages, transform: v2.Transform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[torch.Tensor, int]:
        index, seed = index if isinstance(index, tuple) else (index, 0)
        image, label = self.images[index]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The batches of one process from one step to another, as pairs of index and seed.

    Each epoch shuffles anew and drops what does not fill a batch. A step's images depend on the
    step and the seed only; the processes share them out.

    Args:
        num_images (int): at least one batch.
        batch_size (int): of all processes together.
        start, stop (int): steps, counted from the beginning of the training.
        seed (int): of the whole training, not negative.
    """

    def __init__(
        self, num_images: int, batch_size: int, start: int, stop: int, seed: int = 0
    ) -> None:
        self.num_images = num_images
        self.batch_size = batch_size
        self.steps = range(start, stop)
        self.seed = seed

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mine = slice(comm.get_rank(), None, comm.get_world_size())
        order, shuffled = torch.empty(0), -1
        for step in self.steps:
            epoch, batch = divmod(step, self.num_images // self.batch_size)
            if epoch != shuffled:
                (order_seed,) = _seeds(1, self.seed, epoch)
                generator = torch.Generator().manual_seed(order_seed)
                order, shuffled = torch.randperm(self.num_images, generator=generator), epoch
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            seeds = _seeds(self.batch_size, self.seed, step, 1)
            yield list(zip(indices[mine].tolist(), seeds[mine]))


def _seeds(number: int, *entropy: int) -> list[int]:
    return np.random.SeedSequence(entropy).generate_state(number, np.uint64).tolist()


def train_loader(images: Dataset, batches: TrainingBatches, num_workers: int) -> DataLoader:
    """Batches (uint8 images (N, 3, H, W), labels (N,)) for one process."""
    return TrainingDataLoader(
        images,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def val_loader(images: Dataset, batch_size: int, num_workers: int) -> DataLoader:
    """Each image once, shared out to the processes; ``batch_size`` is of one process."""
    return TrainingDataLoader(
        images,
        batch_size,
        sampler=InferenceSampler(len(cast(Sized, images))),
        num_workers=num_workers,
    )
