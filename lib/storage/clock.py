"""Times of things that have happened, on a clock that somebody may have turned back."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable


class PastTimes:
    """Keeps times that are on disk from lying in the future.

    A file that was written before the clock was turned back by a day is a day younger than nothing. It counts as
    written when it was first seen, and grows older by the monotonic clock from then on.

    Args:
        now: seconds since 1970.
        monotonic: seconds since any moment, never turned back.
    """

    def __init__(self, now: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._now, self._monotonic = now, monotonic
        self._seen: dict[Hashable, tuple[float, float]] = {}

    def of(self, what: Hashable, at: float) -> float:
        """When something happened, in seconds since 1970 by the clock as it is now; never later than now.

        Args:
            what: names it; another time of the same thing is another event.
            at: the time that is on disk.
        """
        known = self._seen.get(what)
        if known is None or known[0] != at:
            known = self._seen[what] = (at, self._monotonic())
        now = self._now()
        return at if at <= now else now - (self._monotonic() - known[1])
