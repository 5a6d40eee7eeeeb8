"""Prefetching changes when batches are prepared, and nothing else."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from monai.data import Dataset

from lib.trainers.loader import BATCHES_AHEAD, PrefetchingLoader, pin


class _Numbers(Dataset):
    """The numbers from 0, of which one may be broken."""

    def __init__(self, count: int, broken: int | None = None) -> None:
        super().__init__(list(range(count)))
        self.broken, self.asked = broken, 0

    def __getitem__(self, index: int) -> int:
        self.asked += 1
        if index == self.broken:
            raise ValueError(f"number {index} is broken")
        return index


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_batches_come_in_order_and_all(threads: int) -> None:
    loader = PrefetchingLoader(_Numbers(7), threads, batch_size=3)
    for _ in range(2):
        assert [batch.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6]]
    assert not _threads()


def test_threads_prepare_batches_side_by_side() -> None:
    class Meeting(_Numbers):
        together = threading.Barrier(3, timeout=30)

        def __getitem__(self, index: int) -> int:
            self.together.wait()
            return index

    assert [int(batch) for batch in PrefetchingLoader(Meeting(9), 3, batch_size=1)] == list(range(9))


@pytest.mark.parametrize("threads", [1, 3])
def test_error_is_raised_after_the_batches_before_it(threads: int) -> None:
    seen = []
    with pytest.raises(ValueError, match="number 5 is broken"):
        for batch in PrefetchingLoader(_Numbers(9, broken=5), threads, batch_size=2):
            seen.append(batch.tolist())
    assert seen == [[0, 1], [2, 3]]
    assert not _threads()


def test_loop_that_is_left_early_ends_the_threads() -> None:
    for batch in PrefetchingLoader(_Numbers(1000), 3, batch_size=1):
        if int(batch) == 3:
            break
    del batch
    assert not _threads()


@pytest.mark.parametrize("threads", [1, 3])
def test_batches_are_prepared_ahead_and_not_without_bound(threads: int) -> None:
    numbers = _Numbers(100)
    iterator = iter(PrefetchingLoader(numbers, threads, batch_size=1))
    next(iterator)
    limit = time.monotonic() + 5
    while numbers.asked < threads + BATCHES_AHEAD and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.05)
    assert numbers.asked == threads + BATCHES_AHEAD, "one taken, one a thread in hand, and those ahead"
    iterator.close()  # type: ignore[attr-defined]
    assert not _threads()


def test_batch_is_finished_in_the_thread_that_prepared_it() -> None:
    def finish(batch: torch.Tensor) -> tuple[list[int], str]:
        return batch.tolist(), threading.current_thread().name

    found = list(PrefetchingLoader(_Numbers(4), 1, finish, batch_size=2))
    assert [numbers for numbers, _ in found] == [[0, 1], [2, 3]]
    assert all(name.startswith("prefetch") for _, name in found)


@pytest.mark.gpu
def test_pinned_batch_keeps_its_values_and_what_is_no_tensor() -> None:
    batch = {"image": torch.arange(4.0), "name": ["a"]}
    pinned = pin(batch)
    assert pinned["image"].is_pinned() and torch.equal(pinned["image"], batch["image"])
    assert pinned["name"] == ["a"]
