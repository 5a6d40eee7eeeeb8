"""Starts and stops MONAI Label's own server app."""

from __future__ import annotations

import os

# MONAI Label removes all modules called lib when it loads the app's main.py. If lib were loaded twice, its exceptions
# here would be other classes than in the tasks, and would not be recognised.
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
    """Start MONAI Label's app as MONAI Label does, and return its instance."""
    stock = monailabel.app.app
    async with stock.router.lifespan_context(stock):
        yield app_instance()


async def refuse_unknown(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse paths of no route of this project: MONAI Label's own routes read any path and return stack traces.

    Raises:
        HTTPException: 404.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000})
        return
    raise HTTPException(404, f"there is no {scope['path'][:200]!r} here; GET /openapi.json lists what there is")
