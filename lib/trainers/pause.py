"""A training on the GPU that also answers requests stands still while they wait.

The server keeps touching a file as long as requests wait. A file that is old is not from a living server.
"""

from __future__ import annotations

import logging
import time
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


def wait_while_paused(file: Path | None) -> float:
    """Stand still until requests no longer wait; returns the seconds that it took."""
    start = time.monotonic()
    while file is not None and is_paused(file):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return time.monotonic() - start
