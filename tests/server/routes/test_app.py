"""The server as a whole."""

from __future__ import annotations

import gc

from lib.server.app import spare_what_stays


def test_what_is_there_after_the_start_is_not_walked_over_again() -> None:
    cases, before = [{"case": [number]} for number in range(100_000)], gc.get_freeze_count()
    spare_what_stays()
    assert gc.get_freeze_count() - before > 2 * len(cases)
    assert len(gc.get_objects()) < len(cases)
