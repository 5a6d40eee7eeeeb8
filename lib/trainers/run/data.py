"""The crops and validation cases of a training run."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from monai.data import DataLoader, SmartCacheDataset

from lib.cases.labelled import MISSING, PREDICTED
from lib.trainers.datasets import build_crops, build_dataset, build_loader
from lib.trainers.loader import pin
from lib.trainers.parallel import ResumableSampler
from lib.trainers.run.job import TrainingJob

# Each thread holds a case in memory while it draws crops from it.
MOST_LOADING_THREADS = 8


class Batch(NamedTuple):
    """The crops of a step.

    Attributes:
        image: shape (crops, channels, X, Y, Z), on the training device.
        label: shape (crops, 1, X, Y, Z), values of the preset, on the training device.
        missing: shape (crops, classes), true where a label is unknown; on the CPU.
        predicted: shape (crops, classes), true where a label is a model's prediction; on the CPU.
    """

    image: torch.Tensor
    label: torch.Tensor
    missing: torch.Tensor
    predicted: torch.Tensor


class TrainingData:
    """Batches of crops of the training cases.

    Args:
        job: the cases, and how they are cached and loaded.
        device: training device.
        processes: number of training processes.
        cache_bytes: memory for preprocessed cases.
    """

    def __init__(self, job: TrainingJob, device: torch.device, processes: int, cache_bytes: int) -> None:
        cases, recipe = job.train_cases, job.preset.training
        # A GPU augments crops almost instantly; on a core, the crops of a step take a tenth of a second.
        later = device.type == "cuda"
        self.crops = build_crops(
            cases, job.preset, job.dataset, job.case_folder, recipe.crops_per_case, cache_bytes, later
        )
        if isinstance(self.crops.items, SmartCacheDataset):
            self.crops.items.start()
        self._sampler = ResumableSampler(self.crops, recipe.seed)
        threads = count_loading_threads(device, processes)
        self.loader = build_loader(
            self.crops,
            job.dataloader,
            min(recipe.batch_size, len(cases)),
            self._sampler,
            threads,
            pin if later else None,
        )

    def begin_epoch(self, epoch: int, step: int) -> None:
        """Seed the crops of an epoch and their order by seed and epoch, so that a resumed run draws the same.

        Args:
            epoch: from 1.
            step: first step of the epoch to compute.
        """
        self.crops.epoch = epoch
        self._sampler.begin(epoch, step * int(self.loader.batch_size or 1))

    def batches(self, device: torch.device) -> Iterator[tuple[Batch, Callable[[], None]]]:
        """The epoch's batches on ``device``, with augmented crops.

        With each batch comes a function that prepares the next one. If it is called early, preparation overlaps with
        the computation on a GPU; otherwise the next batch is prepared when it is requested.
        """
        source, ready = iter(self.loader), deque[Batch]()

        def prepare() -> None:
            if not ready and (batch := next(source, None)) is not None:
                ready.append(Batch(*self.crops.change(batch, device), batch[MISSING], batch[PREDICTED]))

        prepare()
        while ready:
            yield ready.popleft(), prepare
            prepare()

    def end_epoch(self) -> None:
        """Let a cache that holds only a part of the cases exchange some of them."""
        if isinstance(self.crops.items, SmartCacheDataset):
            self.crops.items.update_cache()

    def close(self) -> None:
        """End the prefetching threads."""
        if isinstance(self.crops.items, SmartCacheDataset):
            self.crops.items.shutdown()


def build_validation_loader(job: TrainingJob) -> DataLoader:
    """The job's validation cases, one by one."""
    kind = "Dataset" if job.dataset == "Dataset" else "PersistentDataset"
    dataset = build_dataset(job.validation_cases, job.preset, kind, job.case_folder)
    return build_loader(dataset, "DataLoader", batch_size=1)


def count_loading_threads(device: torch.device, processes: int, cores: int | None = None) -> int:
    """Number of threads that prepare crops: one next to a training CPU, several for a GPU, which is faster.

    Args:
        device: training device.
        processes: number of training processes.
        cores: cores of this machine; detected if not given.
    """
    if device.type == "cpu":
        return 1
    return max(1, min(MOST_LOADING_THREADS, (cores or os.cpu_count() or 1) // (2 * processes)))
