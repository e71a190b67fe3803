"""Training data whose batches depend on the step: not on processes, workers or interruptions."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset
from detectron2.data.build import _train_loader_from_config, trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import Dataset, Sampler

from .workers import TrainingDataLoader


class TrainLoader:
    """The batches of detectron2's ``build_detection_train_loader``, from any step on.

    One process sees what detectron2 gives it; several share each of its batches out. What is drawn
    at random for an image is the same for the same step, from NumPy, Python's ``random`` or torch.
    So is what the model draws in a step: each batch comes with the process's generators seeded.

    Args:
        cfg (CfgNode): names datasets, sampler, batch size, grouping and workers.
        mapper (callable): as in detectron2.

    Attributes:
        seed (int): of order and augmentation, the same in all processes.
        start (int): the step whose batch comes first.
    """

    def __init__(self, cfg: CfgNode, mapper: Callable[[dict], dict]) -> None:
        options = _train_loader_from_config(cfg, mapper=mapper)
        images = options["dataset"]
        # And not the images, of which the workers have another copy.
        self.is_wide = np.array([image["width"] > image["height"] for image in images])
        self.sampler = options["sampler"]
        self.batch_size = options["total_batch_size"]
        self.is_grouped = options["aspect_ratio_grouping"]
        self.num_workers = options["num_workers"]
        self.mapped = MapDataset(DatasetFromList(images, copy=False), mapper)
        seed = self.sampler._seed
        # detectron2's later versions take SEED -1, which is for any seed, by its word.
        self.seed: int = seed if seed >= 0 else comm.shared_random_seed()
        self.start = 0

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator: it begins with the first step, when it is known which one that is.
        batches = TrainingDataLoader(
            SeededImages(self.mapped),
            batch_sampler=TrainingBatches(self),
            num_workers=self.num_workers,
            collate_fn=trivial_batch_collator,
        )
        for step, batch in enumerate(batches, self.start):
            _seed((self.seed, step, comm.get_rank()))
            yield batch

    def places(self) -> Iterator[tuple[int, int]]:
        """Without end, the index of an image and its place in the training."""
        self.sampler._seed = self.seed
        return ((index, place) for place, index in enumerate(self.sampler._infinite_indices()))

    def batches(self) -> Iterator[list[tuple[int, int]]]:
        """Of all processes together; each of wide or of high images, where they are grouped."""
        if not self.is_grouped:
            places = self.places()
            while True:
                yield list(islice(places, self.batch_size))
        groups: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for index, place in self.places():
            group = groups[bool(self.is_wide[index])]
            group.append((index, place))
            if len(group) == self.batch_size:
                yield group[:]
                group.clear()


class TrainingBatches(Sampler[list[tuple[int, tuple[int, int]]]]):
    """One process's share of each batch: pairs of an image's index and its seed."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        mine = slice(comm.get_rank(), None, comm.get_world_size())
        for batch in islice(self.loader.batches(), self.loader.start, None):
            yield [(index, (self.loader.seed, place)) for index, place in batch[mine]]


class SeededImages(Dataset):
    """Mapped images by index; what is random about the mapping is drawn from the seed with it."""

    def __init__(self, images: MapDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, tuple[int, int]]) -> Any:
        number, entropy = index
        _seed(entropy)
        return self.images[number]


def _seed(entropy: tuple[int, ...]) -> None:
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
