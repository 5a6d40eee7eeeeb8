"""A DICOMweb server that is down, hangs or loses a series; the fake stands where the network would be."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from lib.dicom.attributes import element
from lib.dicom.circuit import SECONDS_OPEN, Circuit
from lib.dicom.remote import SECONDS_A_LIST_IS_KEPT, RemoteSource, _Session, connect
from lib.errors import ImageError, NotFoundError, UpstreamError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Pacs:
    """A DICOMweb client whose server has two series; ``failure`` is raised in place of an answer."""

    base_url = "http://pacs.example/dicom-web"

    def __init__(self) -> None:
        self.uids = ["1.1", "1.2"]
        self.second_study: list[str] = []
        self.failure: Exception | None = None
        self.asked = 0
        self.before_answer: Callable[[], object] = lambda: None

    def search_for_series(self, **_: Any) -> list[dict[str, Any]]:
        self._answer()
        listed = [("1", uid) for uid in self.uids] + [("2", uid) for uid in self.second_study]
        return [element("SeriesInstanceUID", uid) | element("StudyInstanceUID", study) for study, uid in listed]

    def search_for_instances(self, study: str, uid: str, **_: Any) -> list[dict[str, Any]]:
        self._answer()
        return [element("SOPInstanceUID", f"{uid}.{n}") for n in range(3)] if uid in self.uids else []

    def _answer(self) -> None:
        self.asked += 1
        self.before_answer()
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pacs() -> Pacs:
    return Pacs()


@pytest.fixture
def source(pacs: Pacs, clock: Clock) -> RemoteSource:
    return RemoteSource(pacs, ["MR"], Circuit(clock=clock), clock)


def wait_for_attempt() -> None:
    for thread in threading.enumerate():
        if thread.name == "dicomweb-attempt":
            thread.join(10)


def test_list_of_a_server_that_fails_is_the_last_known_with_its_age(
    source: RemoteSource, pacs: Pacs, clock: Clock
) -> None:
    assert set(source.series()) == {"1.1", "1.2"} and source.problem() == ""
    clock.now += 7
    pacs.failure = requests.ReadTimeout()
    assert set(source.series()) == {"1.1", "1.2"}
    assert "ReadTimeout" in source.problem() and "listed 7 s ago" in source.problem()
    assert source.status()["list_age_seconds"] == 7


def test_failure_is_remembered_and_asked_once_for_everybody(source: RemoteSource, pacs: Pacs, clock: Clock) -> None:
    source.series()
    clock.now += SECONDS_A_LIST_IS_KEPT + 1
    pacs.failure, pacs.asked = requests.ConnectionError(), 0
    threads = [threading.Thread(target=source.series) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    with pytest.raises(UpstreamError, match="ConnectionError"):
        source.stamp("1.1")
    assert pacs.asked == 1


def test_circuit_closes_when_the_server_answers_again(source: RemoteSource, pacs: Pacs, clock: Clock) -> None:
    source.series()
    clock.now += SECONDS_A_LIST_IS_KEPT + 1
    pacs.failure = requests.ConnectionError()
    source.series()
    pacs.failure, pacs.uids = None, ["1.3"]
    assert set(source.series()) == {"1.1", "1.2"}, "not asked before the time is over"
    clock.now += SECONDS_OPEN
    source.series()
    wait_for_attempt()
    assert set(source.series()) == {"1.3"} and source.problem() == ""


def test_nobody_waits_while_a_server_that_hangs_is_tried_again(source: RemoteSource, pacs: Pacs, clock: Clock) -> None:
    source.series()
    clock.now += SECONDS_A_LIST_IS_KEPT + 1
    pacs.failure = requests.ReadTimeout()
    source.series()
    clock.now += SECONDS_OPEN
    answers, pacs.asked = threading.Event(), 0
    pacs.before_answer = lambda: answers.wait(30)
    for _ in range(5):
        assert set(source.series()) == {"1.1", "1.2"}
    answers.set()
    wait_for_attempt()
    assert pacs.asked == 1


def test_server_that_never_answered_is_an_upstream_error(source: RemoteSource, pacs: Pacs) -> None:
    pacs.failure = requests.ConnectTimeout()
    for _ in range(3):
        with pytest.raises(UpstreamError, match=r"ConnectTimeout.*never listed"):
            source.series()
    assert pacs.asked == 1


def test_answer_that_is_no_list_is_a_failure(source: RemoteSource, pacs: Pacs) -> None:
    pacs.uids = None  # type: ignore[assignment]
    with pytest.raises(UpstreamError, match="TypeError"):
        source.series()


def test_series_that_has_just_been_deleted_is_not_found(source: RemoteSource, pacs: Pacs, tmp_path: Path) -> None:
    source.series()
    pacs.uids = ["1.2"]
    with pytest.raises(NotFoundError):
        source.stamp("1.1")
    assert set(source.series()) == {"1.2"}, "the list is made anew at once"
    assert len(source.stamp("1.2")) == 16


@pytest.mark.parametrize("status", [404, 410])
def test_series_that_the_server_does_not_find_is_not_found(source: RemoteSource, pacs: Pacs, status: int) -> None:
    source.series()
    response = requests.Response()
    response.status_code = status
    pacs.failure = requests.HTTPError(response=response)
    with pytest.raises(NotFoundError):
        source.stamp("1.1")


def test_error_of_one_series_leaves_the_circuit_closed(source: RemoteSource, pacs: Pacs) -> None:
    source.series()
    response = requests.Response()
    response.status_code = 500
    pacs.failure = requests.HTTPError(response=response)
    with pytest.raises(UpstreamError, match="500"):
        source.stamp("1.1")
    pacs.failure = None
    assert len(source.stamp("1.2")) == 16


def test_series_of_one_uid_in_two_studies_is_refused_and_told_and_the_others_go_on(
    pacs: Pacs, source: RemoteSource, clock: Clock, tmp_path: Path
) -> None:
    assert source.stamp("1.2")
    pacs.second_study = ["1.2"]
    clock.now += SECONDS_A_LIST_IS_KEPT + 1
    for question in (lambda: source.stamp("1.2"), lambda: source.fetch("1.2", tmp_path)):
        with pytest.raises(ImageError, match=r"series 1\.2 is in the studies 1 and 2, and viewers name an image by"):
            question()
    assert source.stamp("1.1")
    assert list(source.status()["problems"]) == ["series 1.2"]
    pacs.second_study = []
    clock.now += SECONDS_A_LIST_IS_KEPT + 1
    assert source.stamp("1.2") and "problems" not in source.status()


class ClosingServer:
    """An HTTP server that answers some requests of a connection, and closes it at the next without a response.

    Args:
        answered: number of requests that are answered on the first connection, the second, and so on.
    """

    def __init__(self, *answered: int) -> None:
        self._answered, self.requests = answered, list[str]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(30)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        for count in self._answered:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # the test has ended
                return
            with connection:
                connection.settimeout(2)
                for number in range(count + 1):
                    try:
                        asked = connection.recv(65536)  # a request of these tests comes in one piece
                    except TimeoutError:  # the client has no more requests
                        return
                    if not asked:
                        break
                    self.requests.append(asked.split()[0].decode())
                    if number < count:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

    def close(self) -> None:
        with contextlib.suppress(OSError):  # where nobody waits for a connection
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(30)


@pytest.fixture
def closing() -> Iterator[Callable[..., ClosingServer]]:
    servers: list[ClosingServer] = []

    def start(*answered: int) -> ClosingServer:
        servers.append(ClosingServer(*answered))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_query_on_a_connection_that_the_server_has_just_closed_is_sent_again(
    closing: Callable[..., ClosingServer],
) -> None:
    server = closing(1, 1)
    client = connect(server.url, None, None, {})
    assert [client.search_for_series(), client.search_for_series()] == [[], []]
    assert server.requests == ["GET", "GET", "GET"], "the second of them got no response"


def test_server_that_closes_every_connection_is_asked_twice_and_not_again(
    closing: Callable[..., ClosingServer],
) -> None:
    server = closing(0, 0, 0)
    with pytest.raises(requests.ConnectionError, match="Connection aborted"):
        connect(server.url, None, None, {}).search_for_series()
    assert server.requests == ["GET", "GET"]


def test_what_changes_a_server_is_not_sent_again(closing: Callable[..., ClosingServer]) -> None:
    server = closing(0, 0)
    with pytest.raises(requests.ConnectionError, match="Connection aborted"):
        _Session().post(server.url)
    assert server.requests == ["POST"]
