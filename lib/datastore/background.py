"""A background task that many places may request, and that runs once for all recent requests."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable

from lib.storage.full_disk import storage_problem

logger = logging.getLogger("unetr.datastore")

# Long work runs rarely, so that it takes at most a twentieth of the time.
SHARE_OF_TIME = 1 / 20


class Deferred:
    """Runs a function some time after it was requested, and once before the process ends.

    Args:
        work: the function.
        seconds: delay after the first of several requests.
        name: name of the thread.
    """

    def __init__(self, work: Callable[[], None], seconds: float, name: str) -> None:
        self._work, self._seconds, self._name = work, seconds, name
        self._changed = threading.Condition()
        self._wanted, self._closed = False, False
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Request a run."""
        with self._changed:
            self._wanted = True
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify()

    def flush(self) -> None:
        """Run now, if a run has been requested."""
        with self._changed:
            wanted, self._wanted = self._wanted, False
        if wanted:
            self._do()

    def close(self) -> None:
        """Run if a run has been requested, and end the thread."""
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
