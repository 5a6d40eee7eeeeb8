"""The server as a whole."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from lib.datastore.leases import Lease
from lib.datastore.store import VersionedDatastore
from lib.server.app import spare_what_stays
from lib.server.dependencies import get_next_case, get_presented, get_store
from lib.server.routes.app import is_viewer, router
from tests.server.in_process import InProcess
from tests.tiny import boxes, write_nifti


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


class _Deleting:
    """Chooses the cases of a folder in turn; the first is deleted by somebody before its choice is answered.

    Args:
        store: the studies.
        moment: when it is deleted: while a strategy looks at the images, once it is chosen, or while its mask is asked
            for.
    """

    def __init__(self, store: VersionedDatastore, moment: str) -> None:
        self._store, self._left, self._moment = store, ["case_1", "case_2"], moment
        self.strategies = {"first": None}

    def choose(self, request: dict[str, Any], client: str, hidden: frozenset[str]) -> tuple[dict[str, Any], Lease]:
        image = self._left.pop(0)
        if self._left and self._moment == "while a strategy chooses":
            self._store.remove_image(image)
            self._store.stamp(image)
        lease = self._store.leases.take(image, client)
        assert lease is not None
        if self._left and self._moment == "once it is chosen":
            self._store.remove_image(image)
        return {"id": image, "next": []}, lease

    def compute_ahead(self, chosen: dict[str, Any]) -> None:
        if self._moment == "while it is computed ahead" and chosen["id"] == "case_1":
            self._store.remove_image(chosen["id"])
            self._store.stamp(chosen["id"])
        assert chosen["id"] == "case_2"


@pytest.mark.parametrize("moment", ["while a strategy chooses", "once it is chosen", "while it is computed ahead"])
def test_case_that_is_deleted_while_it_is_handed_out_gives_way_to_the_next(tmp_path: Path, moment: str) -> None:
    """It was a 404 that named a case for which nobody had asked, and a lease of what there is no more."""
    for name in ("case_1", "case_2"):
        write_nifti(tmp_path / f"{name}.nii.gz", boxes()[0])
    store = VersionedDatastore(str(tmp_path))
    presented = SimpleNamespace(attributes=lambda _: {})
    api = InProcess(router, {get_store: store, get_next_case: _Deleting(store, moment), get_presented: presented})
    answer = api.request("POST", "/activelearning/first", json={"client_id": "anna"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"] == "case_2"
    assert list(store.leases.active()) == ["case_2"]
    store.close()
