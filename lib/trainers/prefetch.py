"""Preparing the next batch while this one trains."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from monai.data import DataLoader

BATCHES_AHEAD = 2
SECONDS_BETWEEN_LOOKS = 0.1


class PrefetchingLoader(DataLoader):
    """A loader that prepares batches in a thread, and raises here what went wrong there.

    MONAI's ThreadDataLoader loses an error of its thread: a case that cannot be read ends the epoch without a word.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(BATCHES_AHEAD)
        left = threading.Event()
        thread = threading.Thread(target=_fill, args=(batches, ready, left), name="prefetch", daemon=True)
        thread.start()
        try:
            while True:
                batch, error = ready.get()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield batch
        finally:
            left.set()
            thread.join()


def _fill(batches: Iterator[Any], ready: queue.Queue[tuple[Any, BaseException | None]], left: threading.Event) -> None:
    """Put batches into ``ready``, and in the end why there are no more, until nobody waits for them any longer."""
    error: BaseException | None = None
    while error is None and not left.is_set():
        batch = None
        try:
            batch = next(batches)
        except BaseException as raised:  # noqa: BLE001 - raised again in the thread that trains
            error = raised
        _put((batch, error), ready, left)


def _put(
    item: tuple[Any, BaseException | None],
    ready: queue.Queue[tuple[Any, BaseException | None]],
    left: threading.Event,
) -> None:
    while not left.is_set():
        try:
            ready.put(item, timeout=SECONDS_BETWEEN_LOOKS)
        except queue.Full:
            continue
        return
