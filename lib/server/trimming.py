"""Memory that requests have freed goes back to the system now and then.

Each of the threads that answer requests frees images, masks and pictures in a region of its own (an arena of glibc),
which keeps them for what that thread asks for next: over hours, every region grows to the largest request it has seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread

from lib.infers.memory import give_back_freed
from lib.server.background import in_background

SECONDS_BETWEEN_TRIMS = 30.0


@asynccontextmanager
async def trimming(seconds: float = SECONDS_BETWEEN_TRIMS) -> AsyncIterator[None]:
    """While this lasts, freed memory is given back every so many seconds."""
    async with in_background("trimming", _trim(seconds)):
        yield


async def _trim(seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await anyio.to_thread.run_sync(give_back_freed)
