"""Datasets with bounded memory, under the names of MONAI Label's train request."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset, SmartCacheDataset
from monai.transforms import Compose, EnsureTyped
from torch.utils.data import Dataset as TorchDataset

from lib.cases.labelled import MISSING, PREDICTED, Case, CaseReader, ReadCased
from lib.configs.preset import Preset
from lib.errors import ParameterError
from lib.infers.memory import is_out_of_memory, release_memory
from lib.trainers.loader import PrefetchingLoader
from lib.trainers.parallel import ResumableSampler
from lib.transforms.augment import build_changes, build_cropping
from lib.transforms.preprocess import IMAGE, LABEL, build_preprocessing

logger = logging.getLogger(__name__)

DATASET_KINDS = ("PersistentDataset", "CacheDataset", "SmartCacheDataset", "Dataset")
LOADER_KINDS = ("ThreadDataLoader", "DataLoader")
DISK_SHARE_FOR_CACHE = 0.5
SEED = "seed"
ITEM_FORMAT = 2
"""Raised with each change of the entries of a preprocessed case, so that caches of before are not read."""


class BoundedPersistentDataset(PersistentDataset):
    """MONAI's persistent dataset, limited so that it never fills the disk.

    It uses at most half of the space that is free when it is created; further cases are preprocessed each time.
    """

    def __init__(self, data: Sequence[Any], transform: Compose, cache_dir: Path) -> None:
        super().__init__(data, transform, cache_dir=cache_dir)
        self._remaining_bytes = int(shutil.disk_usage(cache_dir).free * DISK_SHARE_FOR_CACHE)

    def _cachecheck(self, item_transformed: Any) -> Any:
        name = self.hash_func(item_transformed).decode("utf-8") + self.transform_hash
        file = Path(self.cache_dir or "") / f"{name}.pt"
        if file.is_file():
            return self._map(file) or super()._cachecheck(item_transformed)
        if self._remaining_bytes <= 0:
            return self._pre_transform(deepcopy(item_transformed))
        kept = super()._cachecheck(item_transformed)
        self._remaining_bytes -= file.stat().st_size if file.is_file() else 0
        return kept

    @staticmethod
    def _map(file: Path) -> Any:
        """The case as a memory map, of which only the crops are read; None if the file cannot be mapped."""
        try:
            return torch.load(file, mmap=True, weights_only=True)
        except (OSError, RuntimeError, UnpicklingError) as error:
            logger.warning("%s is read whole: %s", file.name, error)
            return None


class SeededItems(TorchDataset[Any]):
    """A dataset whose random crops and augmentations depend only on the seed, the epoch and the index of the item.

    It therefore does not matter which process or thread reads an item, or whether the run was interrupted.

    Args:
        items: the dataset.
        cropping: draws a list of crops from an item.
        changes: augmentations of each crop.
        seed: seed of the run.
        changed_later: whether crops are returned without augmentation, with what :meth:`change` needs under ``seed``.
    """

    def __init__(
        self, items: Dataset, cropping: Compose, changes: Compose, seed: int, changed_later: bool = False
    ) -> None:
        self.items = items
        self.epoch = 1
        self.changed_later = changed_later
        self._cropping, self._changes, self._seed = cropping, changes, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        seeds = np.random.SeedSequence((self._seed, self.epoch, index))
        cropping = deepcopy(self._cropping).set_random_state(seed=int(seeds.generate_state(1)[0]))
        crops = cropping(self.items[index])
        own = seeds.generate_state(1 + len(crops))[1:].tolist()
        if self.changed_later:
            return [{**crop, SEED: seed} for crop, seed in zip(crops, own, strict=True)]
        changes = deepcopy(self._changes)
        return [changes.set_random_state(seed=seed)(crop) for crop, seed in zip(crops, own, strict=True)]

    def change(self, batch: Mapping[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels of a batch of crops on ``device``, augmented there unless the loader has done so already.

        If a GPU has no memory for the augmentation, it is done on the host.
        """
        if not self.changed_later:
            return batch[IMAGE].to(device, non_blocking=True), batch[LABEL].to(device, non_blocking=True)
        try:
            return self._change_on(device, batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        release_memory(device)
        images, labels = self._change_on(torch.device("cpu"), batch)
        return images.to(device), labels.to(device)

    def _change_on(self, device: torch.device, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = (batch[key].to(device, non_blocking=True) for key in (IMAGE, LABEL))
        changed = [
            self._changes.set_random_state(seed=seed)({IMAGE: image, LABEL: label})
            for image, label, seed in zip(images, labels, batch[SEED].tolist(), strict=True)
        ]
        return torch.stack([crop[IMAGE] for crop in changed]), torch.stack([crop[LABEL] for crop in changed])


def build_dataset(
    cases: Sequence[Case],
    preset: Preset,
    kind: str,
    cache_dir: Path,
    cache_bytes: int = 0,
    read: CaseReader | None = None,
) -> Dataset:
    """Build a dataset of preprocessed whole cases.

    Args:
        cases: the cases to read.
        preset: the preset.
        kind: ``PersistentDataset`` stores preprocessed cases on disk, in up to half of the free space; the two caches
            keep as many as fit into ``cache_bytes`` of memory, at least one; ``Dataset`` keeps none.
        cache_dir: folder of the persistent dataset.
        cache_bytes: memory for cases.
        read: function that reads a case; by default :func:`lib.cases.labelled.read_case`.

    Raises:
        ParameterError: for an unknown kind.
    """
    if kind not in DATASET_KINDS:
        raise ParameterError("dataset", kind, ", ".join(DATASET_KINDS))
    fixed: list[Any] = [
        ReadCased(preset, read),
        *build_preprocessing(preset, (IMAGE, LABEL)).transforms,
        EnsureTyped(IMAGE, dtype=torch.float32, track_meta=False),
        EnsureTyped(LABEL, dtype=torch.uint8, track_meta=False),
    ]
    items, transform = [case.as_item() for case in cases], Compose(fixed)
    if kind == "PersistentDataset":
        return BoundedPersistentDataset(items, transform, cache_dir=cache_dir / preprocessing_digest(preset))
    if kind == "Dataset":
        return Dataset(items, transform)
    count = min(len(items), _cases_that_fit(items[0], fixed, cache_bytes))
    logger.info("%s keeps %d of %d cases in memory", kind, count, len(items))
    if kind == "CacheDataset" or count == len(items):
        return CacheDataset(items, transform, cache_num=count, progress=False)
    return SmartCacheDataset(items, transform, cache_num=count, replace_rate=0.25, progress=False, shuffle=False)


def build_crops(
    cases: Sequence[Case],
    preset: Preset,
    kind: str,
    cache_dir: Path,
    crops_per_case: int,
    cache_bytes: int = 0,
    changed_later: bool = False,
) -> SeededItems:
    """Build a dataset of random crops for training; for other arguments see :func:`build_dataset`.

    Args:
        crops_per_case: number of crops of each item.
        changed_later: whether :meth:`SeededItems.change` augments the crops, on the training device.

    Raises:
        ParameterError: for an unknown kind.
    """
    items = build_dataset(cases, preset, kind, cache_dir, cache_bytes)
    cropping, changes = build_cropping(preset, crops_per_case, (MISSING, PREDICTED)), build_changes(preset)
    return SeededItems(items, cropping, changes, preset.training.seed, changed_later)


def build_loader(
    dataset: TorchDataset[Any],
    kind: str,
    batch_size: int,
    sampler: ResumableSampler | None = None,
    threads: int = 1,
    finish: Callable[[Any], Any] | None = None,
) -> DataLoader:
    """Build the loader: prefetching in threads (``ThreadDataLoader``), or plain (``DataLoader``).

    Args:
        dataset: the dataset.
        kind: one of ``LOADER_KINDS``.
        batch_size: number of items of this process in a batch.
        sampler: order of the items; by default that of the dataset.
        threads: number of prefetching threads.
        finish: last step of these threads for each batch.

    Raises:
        ParameterError: for an unknown kind.
    """
    if kind not in LOADER_KINDS:
        raise ParameterError("dataloader", kind, ", ".join(LOADER_KINDS))
    options: dict[str, Any] = {"batch_size": batch_size, "sampler": sampler}
    if kind == "DataLoader":
        return DataLoader(dataset, num_workers=0, **options)
    return PrefetchingLoader(dataset, threads, finish, **options)


def _cases_that_fit(item: dict[str, Any], fixed: Sequence[Any], cache_bytes: int) -> int:
    """How many preprocessed cases of the size of the first one fit into the cache."""
    first = Compose(fixed)(item)
    size_bytes: int = sum(first[key].element_size() * first[key].nelement() for key in (IMAGE, LABEL))
    return max(1, cache_bytes // size_bytes)


def preprocessing_digest(preset: Preset) -> str:
    """Name of a preset's cache, which changes with its preprocessing and the format of cases."""
    keys = {"axcodes", "spacing_mm", "roi_size", "intensity", "padding", "labels"}
    relevant = preset.model_dump_json(include=keys | {"channels"} if preset.channels else keys)
    return hashlib.sha256(f"{ITEM_FORMAT} {relevant}".encode()).hexdigest()[:16]
