"""Preparing the next batches while this one trains."""

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
    """A loader that prepares batches in threads, in their order, and raises here what went wrong there.

    MONAI's ThreadDataLoader loses an error of its thread: a case that cannot be read ends the epoch without a word.

    Args:
        dataset: whose items may be asked for by several threads at once.
        threads: that prepare a batch each; one is enough where a batch is prepared faster than one trains.
        finish: what they do with the batch in the end, such as :func:`pin`.
        options: of the loader.
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
        """Where there are several, PyTorch is not to use all cores in each of them."""
        if self._threads > 1:
            torch.set_num_threads(1)

    def _prepare(self, indices: Sequence[int]) -> Any:
        batch = self.collate_fn([self.dataset[index] for index in indices])
        return batch if self._finish is None else self._finish(batch)


def pin(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch in memory that a GPU reads by itself: other memory is copied only when all that runs there is done."""
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
