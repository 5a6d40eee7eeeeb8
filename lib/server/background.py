"""Work in the background for as long as the server runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any


@asynccontextmanager
async def in_background(name: str, *work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """While this lasts, the work is done beside everything else; at the end it is cancelled, and its end waited for."""
    tasks = [asyncio.create_task(one, name=name) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
