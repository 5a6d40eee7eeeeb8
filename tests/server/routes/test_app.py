"""The server as a whole."""

from __future__ import annotations

import gc
import weakref

import pytest
from fastapi import Request

from lib.server.app import spare_what_stays
from lib.server.routes.app import is_viewer


def test_what_is_there_after_the_start_is_not_walked_over_again() -> None:
    cases, before = [{"case": [number]} for number in range(100_000)], gc.get_freeze_count()
    spare_what_stays()
    assert gc.get_freeze_count() - before > 2 * len(cases)
    assert len(gc.get_objects()) < len(cases)


class Kept:
    """What garbage holds on to, such as the mask in a stack trace."""


def test_garbage_that_has_grown_old_is_still_collected() -> None:
    """Python looks for old garbage once a quarter as much has grown old as there was when it last did."""
    started_with = [{"case": [number]} for number in range(100_000)]
    spare_what_stays()
    kept = Kept()
    garbage: list[object] = [kept]
    garbage.append(garbage)
    gc.collect(1)  # what is left after that is old
    is_there = weakref.ref(kept)
    del kept, garbage
    for _ in range(200_000):  # requests: of what each makes, nothing is left
        request: list[object] = []
        request.append(request)
    assert is_there() is None
    assert len(started_with) == 100_000


@pytest.mark.parametrize(
    ("referer", "viewer"),
    [
        (b"http://localhost:8000/ohif/monai-label?StudyInstanceUIDs=1", True),
        (b"/ohif/", True),
        (b"", False),
        (b"http://localhost:8000/", False),
        (b"http://[/ohif/", False),
        (b"http://[::1/ohif/", False),
        (b"http://localhost:x/ohif/", False),
        (b"\xff\xfe/ohif/", False),
    ],
)
def test_viewer_is_known_by_the_page_that_asks_whatever_stands_there(referer: bytes, viewer: bool) -> None:
    """An address that is none made ``/info/`` and Next Sample a 500."""
    assert is_viewer(Request({"type": "http", "headers": [(b"referer", referer)], "root_path": ""})) is viewer
