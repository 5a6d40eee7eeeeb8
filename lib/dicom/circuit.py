"""Whether a server behind this one is asked: for some seconds after a failure it is not (the circuit is open)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SECONDS_OPEN = 3.0


class Circuit:
    """Remembers that a server failed, so that its clients are told at once and do not each wait for a time-out.

    The source of the method is M. Nygard, Release It!, "Circuit Breaker".

    Args:
        seconds_open: time after a failure during which nothing is asked; then one attempt is made.
        clock: seconds that only rise.
    """

    def __init__(self, seconds_open: float = SECONDS_OPEN, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds_open = seconds_open
        self._clock = clock
        self._lock = threading.Lock()
        self._reason = ""
        self._failing_since = self._failed_at = 0.0
        self._attempting = False

    @property
    def is_open(self) -> bool:
        """Whether the last thing that is known of the server is a failure."""
        return bool(self._reason)

    @property
    def problem(self) -> str:
        """What failed and for how long, for a sentence; empty when nothing does."""
        reason = self._reason
        return f"{reason}, for {self._clock() - self._failing_since:.0f} s" if reason else ""

    def fail(self, reason: str) -> None:
        """The server failed."""
        with self._lock:
            self._failed_at = self._clock()
            if not self._reason:
                self._failing_since = self._failed_at
            self._reason, self._attempting = reason, False

    def succeed(self) -> None:
        """Record that the server has answered: the circuit is closed."""
        with self._lock:
            self._reason, self._attempting = "", False

    def begin_attempt(self) -> bool:
        """Whether it is this caller's turn to try an open circuit again; one caller at a time, once the time is over.

        The caller that gets True calls ``fail`` or ``succeed`` afterwards.
        """
        with self._lock:
            due = self._clock() - self._failed_at >= self._seconds_open
            if not self._reason or self._attempting or not due:
                return False
            self._attempting = True
            return True
