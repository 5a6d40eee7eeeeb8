"""Limits how many requests read images and labels at a time, since each needs much memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import anyio
import anyio.to_thread

Result = TypeVar("Result")

READERS_AT_ONCE = 2
WRITERS_AT_ONCE = 3


class Readers:
    """Runs functions that read files of requests in separate threads, so that light requests find theirs free.

    Args:
        at_once: number of concurrent readers; each needs the memory of its image.
        threads: number of threads, including those that receive, write and wait for the disk.
    """

    def __init__(self, at_once: int = READERS_AT_ONCE, threads: int = WRITERS_AT_ONCE) -> None:
        self._reading = threading.BoundedSemaphore(at_once)
        self._threads = anyio.CapacityLimiter(max(at_once, threads))

    @property
    def reading(self) -> AbstractContextManager[object]:
        """Wait for a reader's place, and hold it within the block; one thread must not enter it twice."""
        return self._reading

    async def beside(self, work: Callable[[], Result]) -> Result:
        """Run a function in a thread, in which it may read while it holds :attr:`reading`."""
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def read(self, work: Callable[[], Result]) -> Result:
        """Run a function in a thread that holds a reader's place all the time."""

        def reading() -> Result:
            with self._reading:
                return work()

        return await self.beside(reading)
