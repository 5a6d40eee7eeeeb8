"""Pauses a training on a GPU while inference requests wait for the device.

The server touches a file repeatedly while requests wait. A file with an old timestamp is ignored, since its server no
longer runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger("unetr.train")

SECONDS_FRESH = 5.0
SECONDS_BETWEEN_LOOKS = 0.02


def is_paused(file: Path) -> bool:
    """Whether the server has claimed the device within the last seconds."""
    try:
        return abs(time.time() - file.stat().st_mtime) < SECONDS_FRESH  # the clock may have been set back
    except OSError:
        return False


def wait_while_paused(file: Path | None, sleep: Callable[[float], None] = time.sleep) -> float:
    """Wait until no request needs the device; returns the seconds waited.

    Args:
        file: file that the server touches; None to return at once.
        sleep: sleeps for a number of seconds between two checks of the file.
    """
    start = time.monotonic()
    while file is not None and is_paused(file):
        sleep(SECONDS_BETWEEN_LOOKS)
    return time.monotonic() - start
