"""Times of past events, robust against a clock that was set back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class PastTimes:
    """Keeps stored times from lying in the future.

    A file that was written before the clock was set back by a day has a time in the future. It is treated as written
    when it was first seen, and ages by the monotonic clock from then on.

    Args:
        now: seconds since 1970.
        monotonic: seconds of a clock that is never set back.
    """

    def __init__(self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now, self._monotonic = now, monotonic
        self._seen: dict[Hashable, tuple[float, float]] = {}

    def of(self, what: Hashable, at: float) -> float:
        """Time of an event, in seconds since 1970 by the current clock; never later than now.

        Args:
            what: identifies the event; another time of the same thing is another event.
            at: the stored time.
        """
        known = self._seen.get(what)
        if known is None or known[0] != at:
            known = self._seen[what] = (at, self._monotonic())
        now = self._now()
        return at if at <= now else now - (self._monotonic() - known[1])
