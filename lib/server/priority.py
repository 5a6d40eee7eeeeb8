"""Priorities between requests and inferences for the processor and for Python's interpreter lock."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import anyio.to_thread

NICER_THAN_REQUESTS = 4
"""Niceness of inferences, slightly below that of trainings (``lib.server.work.job_process``), which pause meanwhile."""
LEAST_PRIORITY = 19
SECONDS_BETWEEN_SWITCHES = 0.001
THREADS_FOR_FILES = max(3, min(8, (os.cpu_count() or 1) + 1))
"""One more than there are cores; the interpreter lock lets more than a few only wait for each other."""
THREADS_FOR_PACS = 40
"""As many as AnyIO has by default."""


def give_requests_priority() -> None:
    """Give this thread, and those that it starts, less than half of the weight of threads that answer requests.

    An inference uses all cores until it ends, whereas most requests take a few milliseconds. Only Linux has priorities
    of threads.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        nicer = min(LEAST_PRIORITY, os.getpriority(os.PRIO_PROCESS, thread) + NICER_THAN_REQUESTS)
        os.setpriority(os.PRIO_PROCESS, thread, nicer)


def limit_threads(waits_for_pacs: bool) -> None:
    """Set how many requests are handled in threads at the same time; the others wait for their turn.

    Requests on local files compute most of the time, and share the cores and the interpreter lock. If many do so at
    once, one with many short reads and writes, such as the save of a label, waits for the lock after each of them.
    Requests that wait for a PACS compute little, and one that does not respond must not keep the threads of all others.

    Must be called in the event loop.
    """
    limiter = anyio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = THREADS_FOR_PACS if waits_for_pacs else THREADS_FOR_FILES


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
