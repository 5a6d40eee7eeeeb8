"""Who goes first where requests and inferences compete for the processor and for Python's interpreter lock."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NICER_THAN_REQUESTS = 4
"""A little less than trainings are (``lib.server.work.job_process``), which stand still during an inference."""
LEAST_PRIORITY = 19
SECONDS_BETWEEN_SWITCHES = 0.001


def give_requests_priority() -> None:
    """Give this thread, and those that it starts, less than half the weight of those that answer requests.

    An inference takes all cores for as long as it lasts, and most requests a few milliseconds. Only Linux has a
    priority for each thread.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nicer = min(LEAST_PRIORITY, os.getpriority(os.PRIO_PROCESS, thread) + NICER_THAN_REQUESTS)
        os.setpriority(os.PRIO_PROCESS, thread, nicer)


@contextmanager
def switching_often(seconds: float = SECONDS_BETWEEN_SWITCHES) -> Iterator[None]:
    """While this lasts, a thread that computes in Python lets others go on after so many seconds.

    Each read, write or sync of a file lets go of the interpreter lock, and waits for it again afterwards: by default
    5 ms for each thread that computes, tens of times a request.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
