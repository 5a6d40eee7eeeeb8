"""Prepares the next batches while the current one is used for training."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from monai.data import DataLoader
from torch.utils.data import Dataset

BATCHES_AHEAD = 2


class PrefetchingLoader(DataLoader):
    """A loader that prepares batches in threads, keeps their order, and re-raises errors of the threads.

    MONAI's ThreadDataLoader loses errors of its thread: a case that cannot be read ends the epoch silently.

    Args:
        dataset: a dataset that several threads may read at once.
        threads: number of threads, each of which prepares a batch; one is enough if preparing a batch is faster than
            training on it.
        finish: last step for each batch in the thread, such as :func:`pin`.
        options: options of the loader.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        threads: int = 1,
        finish: Callable[[Any], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dataset, num_workers=0, **options)
        self._threads, self._finish = threads, finish

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        waiting = iter(self.batch_sampler or ())
        coming: deque[Future[Any]] = deque()
        with ThreadPoolExecutor(self._threads, "prefetch", self._begin_thread) as pool:
            try:
                for indices in itertools.islice(waiting, self._threads - 1 + BATCHES_AHEAD):
                    coming.append(pool.submit(self._prepare, indices))
                while coming:
                    batch = coming.popleft().result()
                    coming.extend(pool.submit(self._prepare, indices) for indices in itertools.islice(waiting, 1))
                    yield batch
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _begin_thread(self) -> None:
        """With several threads, limit PyTorch to one core in each of them."""
        if self._threads > 1:
            torch.set_num_threads(1)

    def _prepare(self, indices: Sequence[int]) -> Any:
        batch = self.collate_fn([self.dataset[index] for index in indices])
        return batch if self._finish is None else self._finish(batch)


def pin(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch in pinned memory, from which copies to a GPU run asynchronously."""
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
