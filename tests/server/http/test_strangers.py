"""Bodies that a server must not take in: of strangers, and large ones where parameters are expected."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import Scope

from lib.server.app import create_app, takes_files
from lib.server.http.auth import Authenticator
from lib.server.http.errors import register_error_handlers
from lib.server.http.middleware import SMALL_BODY_BYTES, Surroundings
from lib.server.http.tokens import WatchedTokens, add_token

MULTIPART = "multipart/form-data; boundary=b"
PART = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.nii.gz"\r\n\r\n'
SIZE = 3 * SMALL_BODY_BYTES


@pytest.fixture
def token(tmp_path: Path) -> str:
    return add_token(tmp_path / "tokens.yaml", "anna", "annotator")


def send(tmp_path: Path, path: str, headers: list[tuple[str, str]], chunked: bool = True) -> tuple[httpx.Response, int]:
    """The answer to 3 MiB, and how many bytes a route got to see of them."""
    seen = 0

    async def read(request: Request) -> PlainTextResponse:
        nonlocal seen
        async for block in request.stream():
            seen += len(block)
        return PlainTextResponse("taken")

    async def body() -> AsyncIterator[bytes]:
        yield PART
        for _ in range(48):
            yield bytes(SIZE // 48)
        yield b"\r\n--b--\r\n"

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            content: Any = body() if chunked else PART + bytes(SIZE) + b"\r\n--b--\r\n"
            return await client.put(path, headers=headers, content=content)

    app = FastAPI(routes=[Route("/{path:path}", read, methods=["PUT"])])
    register_error_handlers(app)
    app.add_middleware(Surroundings, takes_files=lambda scope: scope["path"] == "/files")
    app.state.services = SimpleNamespace(
        settings=SimpleNamespace(upload_limit_mib=16),
        authenticator=Authenticator(WatchedTokens(tmp_path / "tokens.yaml"), openid=False),
        metrics=SimpleNamespace(count_request=lambda *_: None),
        changes=SimpleNamespace(mark=lambda *_: None),
    )
    return asyncio.run(ask()), seen


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    "known",
    [[], [("Authorization", "Bearer wrong")], [("Cookie", "unetr_token=wrong")], [("Authorization", "Basic x")]],
)
def test_files_of_strangers_are_not_taken_in(
    tmp_path: Path, token: str, known: list[tuple[str, str]], chunked: bool
) -> None:
    """They were all written to the temporary folder before a route could ask for a token."""
    answer, seen = send(tmp_path, "/files", [("Content-Type", MULTIPART), *known], chunked)
    assert answer.status_code == 401 and answer.json()["error"] == "UnauthorizedError"
    assert answer.headers["www-authenticate"] == "Bearer"
    assert seen <= SMALL_BODY_BYTES
    answer, seen = send(
        tmp_path, "/files", [("Content-Type", MULTIPART), ("Authorization", f"Bearer {token}")], chunked
    )
    assert answer.text == "taken" and seen > SIZE


@pytest.mark.parametrize(
    "kinds", [[MULTIPART], ["application/json", MULTIPART], [MULTIPART, "application/json"], ["Multipart/x"], []]
)
def test_parameters_stay_small_whatever_kind_a_client_says_they_are(
    tmp_path: Path, token: str, kinds: list[str]
) -> None:
    """JSON under the name of a form came into memory as a whole, up to the limit of files."""
    headers = [("Authorization", f"Bearer {token}"), *(("Content-Type", kind) for kind in kinds)]
    answer, seen = send(tmp_path, "/parameters", headers)
    assert answer.status_code == 413 and "larger than 1 MiB" in answer.json()["detail"]
    assert seen <= SMALL_BODY_BYTES


@pytest.mark.parametrize(
    ("method", "path", "takes"),
    [
        ("PUT", "/datastore/", True), ("PUT", "/datastore/image", True), ("PUT", "/datastore/label", True),
        ("PUT", "/session/", True), ("PUT", "/model/tiny", True), ("POST", "/infer/tiny", True),
        ("POST", "/dicom-web/studies", True), ("POST", "/proxy/dicom/stow/studies", True),
        ("POST", "/train/tiny", False), ("POST", "/activelearning/random", False), ("POST", "/auth/token", False),
        ("POST", "/page/login", False), ("PUT", "/leases/skipped", False), ("POST", "/case/case_0/clicks", False),
        ("PUT", "/datastore/image/info", False), ("GET", "/dicom-web/studies", False), ("POST", "/nowhere", False),
    ],
)  # fmt: skip
def test_routes_that_take_files_are_known(method: str, path: str, takes: bool) -> None:
    scope: Scope = {"type": "http", "method": method, "path": path, "headers": [], "root_path": ""}
    assert takes_files(scope) is takes


@pytest.mark.parametrize(
    ("given", "policy"),
    [({}, "frame-ancestors 'self'"), ({"Content-Security-Policy": "default-src 'self'"}, "default-src 'self'")],
)
def test_no_answer_is_shown_in_another_page_or_taken_for_another_kind(given: dict[str, str], policy: str) -> None:
    """The viewer, the API's description and reports could be shown in a frame, and their buttons pressed unseen."""
    app = FastAPI(routes=[Route("/", lambda _: PlainTextResponse("hello", headers=given))])
    app.add_middleware(Surroundings, takes_files=lambda _: False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get("/")

    headers = asyncio.run(ask()).headers
    assert headers.get_list("content-security-policy") == [policy]
    assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "control"),
    [("/label", "private, no-cache"), ("/own", "no-store"), ("/nowhere", "private, no-cache"), ("/ohif/app.js", None)],
)
def test_no_cache_gives_an_answer_of_one_user_to_another(path: str, control: str | None, tmp_path: Path) -> None:
    """A file has an age, by which a shared cache would keep it where it came for a cookie."""
    (tmp_path / "label").write_bytes(b"of a patient")
    routes = [
        Route("/label", lambda _: FileResponse(tmp_path / "label")),
        Route("/own", lambda _: PlainTextResponse("page", headers={"Cache-Control": "no-store"})),
    ]
    app = FastAPI(routes=routes)
    app.get("/ohif/{path:path}")(lambda path: PlainTextResponse("the same for everybody"))
    app.add_middleware(Surroundings, takes_files=lambda _: False)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.get(path)

    assert asyncio.run(ask()).headers.get("cache-control") == control


def test_files_of_a_form_do_not_come_into_memory() -> None:
    """A thousand files of a mebibyte each, as many as a form may have, took a gibibyte."""
    files = 100
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + bytes(900_000) + b"\r\n"

    async def body() -> AsyncGenerator[bytes, None]:
        for _ in range(files):
            yield part
        yield b"--b--\r\n"

    async def peak() -> int:
        tracemalloc.start()
        try:
            form = await MultiPartParser(Headers({"content-type": MULTIPART}), body()).parse()
            assert len(form.getlist("file")) == files
            await form.close()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    create_app()
    assert asyncio.run(peak()) < 20 * 2**20
