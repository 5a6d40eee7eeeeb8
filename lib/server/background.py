"""Background work for the lifetime of the server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any


@asynccontextmanager
async def in_background(name: str, *work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run the work concurrently until the block ends; it is then cancelled and awaited."""
    tasks = [asyncio.create_task(one, name=name) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
