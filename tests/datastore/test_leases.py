"""A case is one client's alone for a while."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lib.datastore.leases import Leases
from lib.errors import NotFoundError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases(tmp_path: Path, clock: Clock):
    opened = Leases(tmp_path / "leases.sqlite", minutes=30, now=clock)
    yield opened
    opened.close()


def test_case_is_one_clients_until_the_time_is_up(leases: Leases, clock: Clock) -> None:
    first = leases.take("a", "anna")
    assert first is not None and first.until - clock.now == 1800
    assert leases.take("a", "bert") is None
    clock.now += 1799
    assert leases.take("a", "bert") is None
    clock.now += 1
    assert leases.active() == {}
    taken = leases.take("a", "bert")
    assert taken is not None and taken.client == "bert" and taken.since == clock.now


def test_requests_renew_all_leases_of_their_client(leases: Leases, clock: Clock) -> None:
    leases.take("a", "anna")
    leases.take("b", "anna")
    leases.take("c", "bert")
    clock.now += 1000
    assert leases.renew("anna") == 2
    clock.now += 900
    assert set(leases.active()) == {"a", "b"}
    assert leases.active()["a"].since == 1000.0
    clock.now += 2000
    assert leases.renew("anna") == 0, "what has ended is not renewed"


def test_release_and_skip_end_a_lease(leases: Leases) -> None:
    leases.take("a", "anna")
    leases.release("a")
    assert leases.take("a", "bert") is not None
    leases.skip("a", "bert", "motion artefacts")
    assert leases.active() == {}
    assert leases.skipped()["a"].reason == "motion artefacts"
    leases.unskip("a")
    assert leases.skipped() == {}
    with pytest.raises(NotFoundError, match="there is no skipped image 'a'"):
        leases.unskip("a")


def test_leases_outlive_a_restart_and_are_shared(leases: Leases, tmp_path: Path, clock: Clock) -> None:
    leases.take("a", "anna")
    leases.skip("b", "anna", "wrong organ")
    other = Leases(tmp_path / "leases.sqlite", minutes=30, now=clock)
    try:
        assert other.take("a", "bert") is None
        assert other.skipped()["b"].client == "anna"
    finally:
        other.close()


def test_damaged_file_is_kept_aside_and_said(tmp_path: Path) -> None:
    (tmp_path / "leases.sqlite").write_bytes(b"no database at all" * 100)
    leases = Leases(tmp_path / "leases.sqlite")
    assert "was damaged" in leases.repaired
    assert leases.take("a", "anna") is not None
    assert len(list(tmp_path.glob("leases.sqlite.damaged-*"))) == 1
    leases.close()


def test_two_clients_at_the_same_time_never_get_the_same_case(tmp_path: Path) -> None:
    stores = [Leases(tmp_path / "leases.sqlite") for _ in range(4)]
    got: dict[str, list[str]] = {}

    def grab(leases: Leases, client: str) -> None:
        got[client] = [f"case_{n}" for n in range(50) if leases.take(f"case_{n}", client)]

    threads = [threading.Thread(target=grab, args=(store, f"client {n}")) for n, store in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [case for cases in got.values() for case in cases]
    assert sorted(taken) == sorted({f"case_{n}" for n in range(50)})
    for store in stores:
        store.close()


def test_lease_from_before_the_clock_was_turned_back_lasts_no_longer_than_any(leases: Leases, clock: Clock) -> None:
    clock.now = 10 * 86_400.0
    leases.take("a", "anna")
    clock.now -= 86_400
    assert leases.take("a", "bert") is None, "it has not ended either"
    assert leases.active()["a"].until == clock.now + 1800
    clock.now += 1801
    assert leases.take("a", "bert") is not None
