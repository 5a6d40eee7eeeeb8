"""MONAI Label's own server app: its start and stop."""

from __future__ import annotations

import os

# MONAI Label forgets all modules called lib when it loads the app's main.py. Loaded twice, lib's exceptions would be
# other classes here than in the tasks, and none of them would be recognised.
os.environ["MONAI_LABEL_RELOAD_APP_LIB"] = "false"

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import monailabel.app
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

STATIC_FILES = Path(monailabel.__file__).parent / "endpoints" / "static"


@asynccontextmanager
async def running_stock_app() -> AsyncIterator[MONAILabelApp]:
    """Start MONAI Label's app as it would itself, and give its instance."""
    stock = monailabel.app.app
    async with stock.router.lifespan_context(stock):
        yield app_instance()


async def refuse_unknown(scope: Scope, receive: Receive, send: Send) -> None:
    """What none of our routes answers does not exist: MONAI Label's own read any path and answer with stack traces.

    Raises:
        HTTPException: 404.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    raise HTTPException(404, f"there is no {scope['path'][:200]!r} here; GET /openapi.json lists what there is")
