"""Slow and half-open connections against a real uvicorn, in this process."""

from __future__ import annotations

import signal
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from lib.server.http.connections import Crowd, Limits
from lib.server.http.encryption import limit_connections, protocol_factory
from tests.certificate import make_certificate

HALF_A_HEADER = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Half: "
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
LARGE = 64 * 2**20
# So that the tests need not wait for seconds.
CHECK_SECONDS = 0.01


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"{len(await request.body())} bytes")


async def large(request: Request) -> StreamingResponse:
    return StreamingResponse(iter([b"0" * 2**20] * (LARGE // 2**20)))


@contextmanager
def serving(
    limits: Limits, encrypted: tuple[Path, Path] | None = None, keep_alive: int = 60
) -> Iterator[tuple[int, Crowd]]:
    """Its port and connections; with a key and a certificate, encrypted ones."""
    app = Starlette(routes=[Route("/", hello, methods=["GET", "POST"]), Route("/large", large)])
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level="error", lifespan="off", timeout_keep_alive=keep_alive
    )
    server, crowd = uvicorn.Server(config), Crowd(limits, CHECK_SECONDS)
    config.load()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if encrypted else None
    if context is not None and encrypted is not None:
        context.load_cert_chain(encrypted[1], encrypted[0])
    config.http_protocol_class = protocol_factory(crowd, context)  # type: ignore[assignment]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], crowd
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)


def connect(port: int, first: bytes = b"") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=10)
    made.sendall(first)
    return made


def answer(made: socket.socket) -> bytes:
    """All of an answer, which ends with its body or with the connection."""
    said = b""
    while not said.endswith(b" bytes") and (block := made.recv(4096)):
        said += block
    return said


def ask(port: int) -> bytes:
    with connect(port, GET) as made:
        return answer(made)


def test_half_headers_are_closed_and_whole_ones_answered() -> None:
    with serving(Limits(64, 64, 0.3, 5)) as (port, _crowd):
        halves = [connect(port, HALF_A_HEADER) for _ in range(20)]
        silent = connect(port)
        assert ask(port).startswith(b"HTTP/1.1 200")
        assert [half.recv(4096)[:12] for half in halves] == [b"HTTP/1.1 408"] * 20
        assert silent.recv(4096) == b""
        for each in (*halves, silent):
            each.close()


def test_the_second_header_of_a_connection_has_its_time_too() -> None:
    with serving(Limits(64, 64, 0.3, 5)) as (port, _), connect(port, GET) as made:
        assert answer(made).startswith(b"HTTP/1.1 200")
        made.sendall(HALF_A_HEADER)
        assert made.recv(4096).startswith(b"HTTP/1.1 408")


def test_an_idle_connection_is_kept_as_long_as_a_header_may_take() -> None:
    """Uvicorn closes it after 5 seconds, in which a client that asks every 5 seconds sends its next question."""
    with serving(Limits(64, 64, 5, 5), keep_alive=0) as (port, _), connect(port, GET) as made:
        assert answer(made).startswith(b"HTTP/1.1 200")
        time.sleep(0.2)
        made.sendall(GET)
        assert answer(made).startswith(b"HTTP/1.1 200")


def test_a_header_that_drips_is_closed_all_the_same() -> None:
    with serving(Limits(64, 64, 0.3, 5)) as (port, _), connect(port, HALF_A_HEADER) as made:
        made.settimeout(0.02)
        said = b""
        for _ in range(200):
            try:
                made.sendall(b"x")
                said += made.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if said:
                break
        assert said.startswith(b"HTTP/1.1 408")


def test_a_body_that_does_not_come_is_closed() -> None:
    with serving(Limits(64, 64, 5, 0.3)) as (port, _), connect(port, POST + b"1") as made:
        assert made.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_takes_nothing_of_its_answer_is_closed() -> None:
    request = b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with serving(Limits(64, 64, 5, 0.3)) as (port, crowd), connect(port, request) as made:
        deadline = time.monotonic() + 10
        while not len(crowd) and time.monotonic() < deadline:
            time.sleep(0.01)
        while len(crowd) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(crowd) == 0
        assert made.recv(4096).startswith(b"HTTP/1.1 200")


def test_beyond_the_limits_the_oldest_half_open_connection_makes_room() -> None:
    with serving(Limits(40, 20, 60, 60)) as (port, crowd):
        halves = [connect(port, HALF_A_HEADER) for _ in range(100)]
        assert ask(port).startswith(b"HTTP/1.1 200")
        assert len(crowd) <= 20
        for half in halves:
            half.close()


def test_a_connection_is_refused_where_all_others_are_busy() -> None:
    with serving(Limits(4, 4, 60, 60)) as (port, crowd):
        busy = []
        for number in range(4):
            busy.append(connect(port, POST))
            while len(crowd) <= number or crowd.waiting:
                time.sleep(0.01)
        assert ask(port).startswith(b"HTTP/1.1 503")
        busy[0].sendall(b"0" * 1000)
        assert answer(busy[0]).endswith(b"1000 bytes")
        for each in busy:
            each.close()


def test_proxies_speak_for_many() -> None:
    with serving(Limits(40, 4, 60, 60, ("127.0.0.0/8",))) as (port, crowd):
        halves = [connect(port, HALF_A_HEADER) for _ in range(30)]
        assert ask(port).startswith(b"HTTP/1.1 200")
        assert 30 <= len(crowd) <= 32
        for half in halves:
            half.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


def encrypt(made: socket.socket, certificate: tuple[Path, Path]) -> ssl.SSLSocket:
    return ssl.create_default_context(cafile=certificate[1]).wrap_socket(made, server_hostname="127.0.0.1")


def hello_of_a_client() -> bytes:
    """The first message of a handshake."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="127.0.0.1")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def ask_encrypted(port: int, certificate: tuple[Path, Path], asked: bytes = GET) -> bytes:
    with encrypt(connect(port), certificate) as made:
        made.sendall(asked)
        return answer(made)


def wait_until_empty(crowd: Crowd) -> None:
    """The client hears of an end before the server has forgotten the connection."""
    deadline = time.monotonic() + 10
    while len(crowd) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(crowd) == 0


def test_handshakes_that_are_not_finished_are_closed_and_whole_ones_answered(certificate: tuple[Path, Path]) -> None:
    hello = hello_of_a_client()
    firsts = [b"", hello[:1], hello[: len(hello) // 2], hello] * 5
    with serving(Limits(64, 64, 2, 5), certificate) as (port, crowd):
        halves = [connect(port, first) for first in firsts]
        assert ask_encrypted(port, certificate).startswith(b"HTTP/1.1 200")
        for half in halves:
            with suppress(ConnectionResetError):
                while half.recv(4096):
                    pass
            half.close()
        wait_until_empty(crowd)
        with encrypt(connect(port), certificate) as made:
            made.sendall(HALF_A_HEADER)
            assert made.recv(4096).startswith(b"HTTP/1.1 408")


def test_what_is_no_handshake_is_closed_at_once(certificate: tuple[Path, Path]) -> None:
    with serving(Limits(64, 64, 60, 60), certificate) as (port, crowd):
        with connect(port, GET) as made, suppress(ConnectionResetError):
            while made.recv(4096):
                pass
        wait_until_empty(crowd)
        assert ask_encrypted(port, certificate).startswith(b"HTTP/1.1 200")


def test_beyond_the_limits_the_oldest_handshake_makes_room(certificate: tuple[Path, Path]) -> None:
    with serving(Limits(40, 20, 60, 60), certificate) as (port, crowd):
        halves = [connect(port) for _ in range(100)]
        body = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 300000\r\n\r\n" + b"0" * 300000
        assert ask_encrypted(port, certificate, body).endswith(b"300000 bytes")
        assert len(crowd) <= 20
        for half in halves:
            half.close()


def test_uvicorn_is_found_as_what_handles_sigterm() -> None:
    server = uvicorn.Server(uvicorn.Config(Starlette()))
    before = signal.signal(signal.SIGTERM, server.handle_exit)
    try:
        crowd = limit_connections(Limits(4, 4, 60, 60))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert crowd is not None and server.config.http_protocol_class == crowd.make


def test_another_server_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    assert limit_connections(Limits(4, 4, 60, 60)) is None
    assert "limit them in front of it" in caplog.text
