"""A circuit breaker for an upstream server: after a failure, no requests are sent for some seconds (the circuit is
open).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

SECONDS_OPEN = 3.0


class Circuit:
    """Remembers failures of a server, so that callers get an error at once instead of a timeout each.

    The method is the "Circuit Breaker" of M. Nygard, Release It!.

    Args:
        seconds_open: time after a failure without requests; then one attempt is made.
        clock: monotonic clock in seconds.
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
        """Whether the last known result of the server was a failure."""
        return bool(self._reason)

    @property
    def problem(self) -> str:
        """The failure and its duration, as part of a sentence; empty without a failure."""
        reason = self._reason
        return f"{reason}, for {self._clock() - self._failing_since:.0f} s" if reason else ""

    def fail(self, reason: str) -> None:
        """Record that the server has failed."""
        with self._lock:
            self._failed_at = self._clock()
            if not self._reason:
                self._failing_since = self._failed_at
            self._reason, self._attempting = reason, False

    def succeed(self) -> None:
        """Record that the server has responded: the circuit is closed."""
        with self._lock:
            self._reason, self._attempting = "", False

    def begin_attempt(self) -> bool:
        """Whether this caller may try an open circuit again, which one caller at a time may do after the waiting time.

        A caller that receives True must call ``fail`` or ``succeed`` afterwards.
        """
        with self._lock:
            due = self._clock() - self._failed_at >= self._seconds_open
            if not self._reason or self._attempting or not due:
                return False
            self._attempting = True
            return True
