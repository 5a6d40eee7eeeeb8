"""Ends the server together with the process that started it, however that one ends."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

logger = logging.getLogger("unetr.server")

ENDS_WITH_INPUT = "UNETR_ENDS_WITH_INPUT"
"""Set by ``run.py``, which holds the other end of standard input open as long as it runs."""
STANDARD_INPUT = 0
SECONDS_TO_STOP = 15.0
EXIT_PARENT_GONE = 3


def end_with_parent() -> threading.Thread | None:
    """Stop this process at the end of its standard input, if its parent process requested this."""
    if os.environ.pop(ENDS_WITH_INPUT, "") != "1":
        return None
    thread = threading.Thread(target=_wait, daemon=True, name="parent")
    thread.start()
    return thread


def _wait() -> None:
    while os.read(STANDARD_INPUT, 4096):
        continue
    logger.warning("the process that started this server is gone, so it stops")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)
    os._exit(EXIT_PARENT_GONE)
