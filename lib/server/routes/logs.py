"""``/logs/``: the server's log and its GPUs, for administrators."""

from __future__ import annotations

import shutil
import subprocess
from collections import deque
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from monailabel.config import settings as stock_settings
from starlette.exceptions import HTTPException

from lib.errors import NotFoundError
from lib.server.http.auth import AsAdmin

router = APIRouter(prefix="/logs", tags=["Others"])

SECONDS_FOR_NVIDIA_SMI = 20


@router.get("/", summary="The end of the server's log", response_class=PlainTextResponse)
def logs(user: AsAdmin, lines: Annotated[int, Query(ge=1, le=100_000)] = 300) -> str:
    """The last lines as text (MONAI Label's own log page needs internet access)."""
    path = Path(stock_settings.MONAI_LABEL_APP_DIR) / "logs" / "app.log"
    if not path.is_file():
        raise NotFoundError("log file", path.name)
    with path.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, lines))


@router.get("/gpu", summary="What nvidia-smi says", response_class=PlainTextResponse)
def gpus(user: AsAdmin) -> str:
    """The GPUs of the server."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise HTTPException(404, "there is no nvidia-smi on this server, so there is no NVIDIA GPU to tell of")
    ended = subprocess.run([program], capture_output=True, text=True, timeout=SECONDS_FOR_NVIDIA_SMI, check=False)
    return ended.stdout or ended.stderr
