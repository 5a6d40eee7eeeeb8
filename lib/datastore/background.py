"""A background task that is requested from many places, and runs once for all requests of the last moments."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable

from lib.storage.full_disk import storage_problem

logger = logging.getLogger("unetr.datastore")

# Work that takes long is done seldom: no more than a twentieth of the time goes into it.
SHARE_OF_TIME = 1 / 20


class Deferred:
    """Does a piece of work some time after it has been asked for, and once before the process ends.

    Args:
        work: what to do.
        seconds: how long after the first of several requests.
        name: of the thread.
    """

    def __init__(self, work: Callable[[], None], seconds: float, name: str) -> None:
        self._work, self._seconds, self._name = work, seconds, name
        self._changed = threading.Condition()
        self._wanted, self._closed = False, False
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Have it done soon."""
        with self._changed:
            self._wanted = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify()

    def flush(self) -> None:
        """Do it now, if it has been asked for."""
        with self._changed:
            wanted, self._wanted = self._wanted, False
        if wanted:
            self._do()

    def close(self) -> None:
        """Do what has been asked for, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            atexit.unregister(self.close)
        self.flush()

    def _run(self) -> None:
        pause = self._seconds
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._closed)
                self._changed.wait_for(lambda: self._closed, timeout=pause)
                if self._closed:
                    return
            start = time.monotonic()
            self.flush()
            pause = max(self._seconds, (time.monotonic() - start) / SHARE_OF_TIME)

    def _do(self) -> None:
        try:
            self._work()
        except Exception as error:
            problem = storage_problem(error)
            logger.log(
                logging.WARNING if problem else logging.ERROR,
                "%s failed, and is tried again when it is asked for next: %s", self._name, problem or error,
                exc_info=None if problem else error,
            )  # fmt: skip
