"""Priorities between requests and inferences for the processor and for Python's interpreter lock."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NICER_THAN_REQUESTS = 4
"""Niceness of inferences, slightly below that of trainings (``lib.server.work.job_process``), which pause meanwhile."""
LEAST_PRIORITY = 19
SECONDS_BETWEEN_SWITCHES = 0.001


def give_requests_priority() -> None:
    """Give this thread, and those that it starts, less than half of the weight of threads that answer requests.

    An inference uses all cores until it ends, whereas most requests take a few milliseconds. Only Linux has priorities
    of threads.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nicer = min(LEAST_PRIORITY, os.getpriority(os.PRIO_PROCESS, thread) + NICER_THAN_REQUESTS)
        os.setpriority(os.PRIO_PROCESS, thread, nicer)


@contextmanager
def switching_often(seconds: float = SECONDS_BETWEEN_SWITCHES) -> Iterator[None]:
    """Within the block, a thread that computes in Python yields to others after this number of seconds.

    Each read, write or sync of a file releases the interpreter lock and waits for it afterwards: by default 5 ms for
    each computing thread, tens of times for each request.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(seconds)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
