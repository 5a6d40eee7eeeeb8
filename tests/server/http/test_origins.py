from __future__ import annotations

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from lib.server.http.exposure import listening_host, warn_if_closed_to_all, warn_if_exposed
from lib.server.http.origins import Origins
from lib.server.http.proxies import is_loopback

VIEWER = "https://viewer.example"


def ask(
    method: str,
    headers: dict[str, str] | list[tuple[str, str]],
    address: str = "127.0.0.1",
    authenticated: bool = False,
) -> httpx.Response:
    app = Starlette(routes=[Route("/", lambda _: PlainTextResponse("hello"), methods=["GET", "PUT", "POST"])])
    app.add_middleware(Origins)
    app.state.services = SimpleNamespace(
        settings=SimpleNamespace(cors_origins=(VIEWER,)), authenticator=SimpleNamespace(enabled=authenticated)
    )
    transport = httpx.ASGITransport(app, client=(address, 5000))

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.request(method, "/", headers=headers)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("method", "origin", "status"),
    [
        ("PUT", None, 200),
        ("PUT", "http://localhost:8000", 200),
        ("PUT", VIEWER, 200),
        ("PUT", "http://localhost:9999", 403),
        ("POST", "http://evil.example", 403),
        ("POST", "null", 403),
        ("GET", "http://evil.example", 200),
    ],
)
def test_changes_are_taken_from_own_and_allowed_pages(method: str, origin: str | None, status: int) -> None:
    headers = {"Origin": origin} if origin else {}
    assert ask(method, headers).status_code == status


@pytest.mark.parametrize(
    ("site", "status"), [("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)]
)
def test_a_change_without_an_origin_is_refused_when_another_page_asks_for_it(site: str, status: int) -> None:
    assert ask("POST", {"Sec-Fetch-Site": site}).status_code == status
    assert ask("POST", {"Sec-Fetch-Site": site}, authenticated=True).status_code == status
    assert ask("POST", {"Sec-Fetch-Site": site, "Origin": VIEWER}).status_code == 200
    assert ask("GET", {"Sec-Fetch-Site": site}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [("Origin", "http://evil.example"), ("Origin", "http://localhost:8000")],
        [("Origin", "http://localhost:8000"), ("Origin", "http://evil.example")],
        [("Origin", VIEWER), ("Origin", "http://evil.example")],
        [("Sec-Fetch-Site", "cross-site"), ("Sec-Fetch-Site", "none")],
        [("Sec-Fetch-Site", "none, cross-site")],
        [("Origin", "http://[")],
        [("Origin", "http://[::1")],
        [("Origin", "http://[v1.x]")],
    ],
)
def test_every_value_of_a_header_counts_and_what_is_no_address_is_refused(headers: list[tuple[str, str]]) -> None:
    assert ask("POST", headers).status_code == 403
    assert ask("POST", headers, authenticated=True).status_code == 403


@pytest.mark.parametrize("host", ["", "evil.example#@localhost", "localhost.evil.example", "0x7f.0.0.1", "2130706433"])
def test_host_that_is_no_name_of_this_machine_is_refused(host: str) -> None:
    assert ask("GET", {"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["[", "[::1", "localhost:x", "localhost:99999999"])
def test_host_that_is_no_address_is_refused_with_tokens_too(host: str) -> None:
    answer = ask("GET", {"Host": host}, authenticated=True)
    assert answer.status_code == 403 and repr(host) in answer.json()["detail"]


def test_only_allowed_pages_may_read_answers() -> None:
    allowed = ask("GET", {"Origin": VIEWER})
    assert allowed.headers["access-control-allow-origin"] == VIEWER
    assert "access-control-allow-credentials" not in allowed.headers
    assert "access-control-allow-origin" not in ask("GET", {"Origin": "http://evil.example"}).headers


def test_preflight_of_an_allowed_page_is_answered() -> None:
    headers = {
        "Origin": VIEWER,
        "Access-Control-Request-Method": "PUT",
        "Access-Control-Request-Headers": "authorization",
    }
    assert ask("OPTIONS", headers).status_code == 200
    assert ask("OPTIONS", headers | {"Origin": "http://evil.example"}).status_code == 400


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("viewer.example", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("", 403),
    ],
)
def test_without_tokens_this_machine_is_answered_under_its_names(host: str, status: int) -> None:
    assert ask("GET", {"Host": host}).status_code == status


def test_with_tokens_or_from_afar_any_name_will_do() -> None:
    assert ask("GET", {"Host": "gpu.hospital"}, authenticated=True).status_code == 200
    assert ask("GET", {"Host": "gpu.hospital"}, address="10.1.2.3").status_code == 200


def test_loopback_addresses() -> None:
    local = {"127.0.0.1", "127.9.9.9", "::1", "localhost"}
    assert {a for a in (*local, "0.0.0.0", "::", "10.0.0.1", "example", "") if is_loopback(a)} == local


@pytest.mark.parametrize(
    ("arguments", "host"),
    [
        (["monailabel", "start_server"], "0.0.0.0"),
        (["monailabel", "start_server", "--host", "127.0.0.1"], "127.0.0.1"),
        (["monailabel", "start_server", "-i", "::1"], "::1"),
        (["monailabel", "start_server", "--host=10.0.0.1"], "10.0.0.1"),
        (["pytest"], None),
    ],
)
def test_listening_host_is_read_from_the_command_line(arguments: list[str], host: str | None) -> None:
    assert listening_host(arguments) == host


def test_warning_is_printed_only_when_everybody_may_do_everything(capsys: pytest.CaptureFixture[str]) -> None:
    everywhere, here = ["monailabel", "start_server"], ["monailabel", "start_server", "--host", "127.0.0.1"]
    assert not warn_if_exposed(here, authenticated=False)
    assert not warn_if_exposed(everywhere, authenticated=True)
    assert capsys.readouterr().err == ""
    assert warn_if_exposed(everywhere, authenticated=False)
    assert "asks NOBODY for a password" in capsys.readouterr().err


def test_start_says_that_nobody_may_when_there_is_no_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert not warn_if_closed_to_all(None) and not warn_if_closed_to_all(1)
    assert capsys.readouterr().err == ""
    assert warn_if_closed_to_all(0)
    assert "nobody may use this server" in capsys.readouterr().err
