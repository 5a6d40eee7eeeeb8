"""Few requests at a time read images and labels, since each takes much memory; more of them may wait for the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import anyio
import anyio.to_thread

Result = TypeVar("Result")

READERS_AT_ONCE = 2
WRITERS_AT_ONCE = 8


class Readers:
    """Runs what reads the files of requests in threads of its own, so that light requests find theirs free.

    Args:
        at_once: how many read at the same time; each takes its image's size in memory.
        threads: how many are at work at the same time, those that receive, write and wait for the disk among them.
    """

    def __init__(self, at_once: int = READERS_AT_ONCE, threads: int = WRITERS_AT_ONCE) -> None:
        self._reading = threading.BoundedSemaphore(at_once)
        self._threads = anyio.CapacityLimiter(max(at_once, threads))

    @property
    def reading(self) -> AbstractContextManager[object]:
        """Wait for a place among those that read, and keep it for the block; not to be entered twice by one thread."""
        return self._reading

    async def beside(self, work: Callable[[], Result]) -> Result:
        """Run work in a thread, in which it may read for as long as it holds :attr:`reading`."""
        return await anyio.to_thread.run_sync(work, limiter=self._threads)

    async def read(self, work: Callable[[], Result]) -> Result:
        """Run work in a thread that reads from its begin to its end."""

        def reading() -> Result:
            with self._reading:
                return work()

        return await self.beside(reading)
