"""A training on the GPU that also answers requests stands still while they wait.

The server keeps touching a file as long as requests wait. A file that is old is not from a living server.
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
    """Whether the server has asked for the device in the last seconds."""
    try:
        return abs(time.time() - file.stat().st_mtime) < SECONDS_FRESH  # the clock may have been turned back
    except OSError:
        return False


def wait_while_paused(file: Path | None, sleep: Callable[[float], None] = time.sleep) -> float:
    """Wait until no request waits for the device; returns the seconds that it took.

    Args:
        file: what the server touches; None: nothing to wait for.
        sleep: waits so many seconds between two looks at the file.
    """
    start = time.monotonic()
    while file is not None and is_paused(file):
        sleep(SECONDS_BETWEEN_LOOKS)
    return time.monotonic() - start
