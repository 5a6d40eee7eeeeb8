"""The server as a whole."""

from __future__ import annotations

import gc

from lib.server.app import spare_what_stays


def test_what_is_there_after_the_start_is_not_walked_over_again() -> None:
    cases = [{"case": [number]} for number in range(100_000)]
    try:
        spare_what_stays()
        assert gc.get_freeze_count() > 2 * len(cases)
        assert len(gc.get_objects()) < len(cases)
    finally:
        gc.unfreeze()
