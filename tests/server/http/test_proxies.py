"""Whose requests are whose: X-Forwarded-For is believed of configured proxies alone."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import Message, Scope
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from lib.configs.settings import Settings
from lib.errors import ConfigError
from lib.server.http.origins import Origins
from lib.server.http.proxies import Clients, is_loopback

FORGED = [(b"host", b"evil.example"), (b"x-forwarded-for", b"203.0.113.9")]


def ask(
    peer: str, at: str, headers: list[tuple[bytes, bytes]], trusted: tuple[str, ...] = (), uvicorn: str = ""
) -> int:
    """The status of a request from ``peer`` at this server's address ``at``; ``uvicorn`` is whom it believes itself."""

    async def hello(scope: Scope, receive: object, send: object) -> None:
        await PlainTextResponse(str(scope["client"][0]))(scope, receive, send)  # type: ignore[arg-type]

    app = Starlette()
    app.router.default = hello  # type: ignore[assignment]
    app.add_middleware(Origins)
    app.add_middleware(Clients)
    app.state.services = SimpleNamespace(
        settings=SimpleNamespace(cors_origins=(), trusted_proxies=trusted), authenticator=SimpleNamespace(enabled=False)
    )
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": b"", "scheme": "http"}
    scope |= {"client": (peer, 5000), "server": (at, 8000), "root_path": ""}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    around = ProxyHeadersMiddleware(app, uvicorn) if uvicorn else app  # type: ignore[arg-type]
    asyncio.run(around(scope, receive, send))  # type: ignore[arg-type]
    return int(sent[0]["status"])


@pytest.mark.parametrize("believed_by_uvicorn", ["", "127.0.0.1"])
def test_a_foreign_name_for_this_machine_is_refused_whatever_x_forwarded_for_says(believed_by_uvicorn: str) -> None:
    assert ask("127.0.0.1", "127.0.0.1", FORGED, uvicorn=believed_by_uvicorn) == 403
    assert ask("::1", "::1", FORGED, uvicorn=believed_by_uvicorn) == 403


def test_a_configured_proxy_says_who_the_client_is() -> None:
    assert ask("127.0.0.1", "127.0.0.1", FORGED, trusted=("127.0.0.0/8",)) == 200
    assert ask("10.0.0.5", "10.0.0.9", [(b"host", b"gpu.hospital"), (b"x-forwarded-for", b"127.0.0.1")]) == 200


def test_another_than_the_configured_proxy_is_not_believed() -> None:
    assert ask("127.0.0.1", "127.0.0.1", FORGED, trusted=("10.0.0.5",), uvicorn="127.0.0.1") == 403


def test_loopback_written_as_ipv6_is_loopback() -> None:
    assert is_loopback("::ffff:127.0.0.1") and not is_loopback("::ffff:10.0.0.1")


def test_proxies_are_addresses_or_networks() -> None:
    assert Settings.from_conf({"trusted_proxies": "10.0.0.5, fd00::/8"}).trusted_proxies == ("10.0.0.5", "fd00::/8")
    with pytest.raises(ConfigError, match=r"'\*' does not appear to be an IPv4 or IPv6"):
        Settings.from_conf({"trusted_proxies": "*"})
