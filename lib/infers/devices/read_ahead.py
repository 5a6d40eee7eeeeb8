"""Reads the next images while a device is busy, a bounded number at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import anyio.to_thread

from lib.errors import UnetrError

logger = logging.getLogger("unetr.devices")


class ReadingAhead:
    """Reads the input of a request while the request waits for a device, if a place is free.

    Args:
        places: semaphore that bounds how many inputs may be in memory.
        read: function that reads the input, in a thread.
    """

    def __init__(self, places: asyncio.Semaphore, read: Callable[[], Any]) -> None:
        self._places, self._read = places, read
        self._begun = False

    async def __aenter__(self) -> ReadingAhead:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        if self._begun:
            self._places.release()

    async def result(self) -> Any:
        """The input; None if no place was free or reading failed. It waits for a read that is in progress."""
        if not self._begun:
            return None
        try:
            return await self._task
        except (UnetrError, OSError, RuntimeError, MemoryError) as error:
            logger.debug("not read ahead, and read again in its turn, which will say why: %s", error)
            return None

    async def _run(self) -> Any:
        await self._places.acquire()
        self._begun = True
        return await anyio.to_thread.run_sync(self._read)
