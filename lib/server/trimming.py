"""Returns memory that requests have freed to the system from time to time.

Each thread that answers requests frees images, masks and pictures in its own memory region (an arena of glibc), which
glibc keeps for that thread's later allocations: over hours, every region grows to the largest request that its thread
has processed.
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
    """Within the block, freed memory is returned at this interval."""
    async with in_background("trimming", _trim(seconds)):
        yield


async def _trim(seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        await anyio.to_thread.run_sync(give_back_freed)
