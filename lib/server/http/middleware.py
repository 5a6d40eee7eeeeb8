"""Wraps every request: a request id, a size limit, one log line, and a response even for a defect."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib.server.http.auth import is_let_in
from lib.server.http.errors import describe, error_response, status_of
from lib.server.http.events import topics_of
from lib.server.http.logs import ACCESS
from lib.server.http.origins import SAFE_METHODS
from lib.server.http.request_id import HEADER, begin_request
from lib.server.starting import tell_failure

access = logging.getLogger(ACCESS)
logger = logging.getLogger("unetr.server")

MIB = 2**20
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
# Without tokens, another page could embed this server's page in a frame and trick users into clicking its buttons.
FOR_BROWSERS = (
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"x-content-type-options", b"nosniff"),
)
# A response is for the client that sent the request: a shared cache in between could give it to another user. The
# viewer's own files are the same for everybody.
NOT_SHARED = ((b"cache-control", b"private, no-cache"),)
SHARED_ROUTES = ("/ohif/{path:path}",)
# Bodies without files, which are parameters in JSON.
SMALL_BODY_BYTES = MIB
# Number of bytes of a refused upload that are read and discarded, so that the client receives the reason: a client that
# is still sending when the connection closes only notices that it closed.
DRAINED_BYTES = 256 * MIB
DRAINING_SECONDS = 20


@dataclass
class _Exchange:
    """The data of a request and its response for the log."""

    scope: Scope
    request_id: str
    start: float
    status: int = 0
    received: int = 0

    @property
    def route(self) -> str:
        """The route template, without ids and names."""
        return str(getattr(self.scope.get("route"), "path", "other"))

    def finish(self) -> None:
        """Count the request and log it as one JSON object, without headers and query, which may be secret."""
        seconds = time.perf_counter() - self.start
        services = getattr(self.scope["app"].state, "services", None)
        if services is not None:
            method = self.scope["method"] if self.scope["method"] in METHODS else "other"
            services.metrics.count_request(method, self.route, self.status, seconds)
            if method not in SAFE_METHODS and 200 <= self.status < 300:
                services.changes.mark(*topics_of(self.route))
        client = self.scope.get("client")
        user = self.scope.get("unetr.user")
        fields = {
            "request_id": self.request_id,
            "client": client[0] if client else None,
            "user": user.name if user else None,
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status,
            "received_bytes": self.received,
            "ms": round(seconds * 1000, 1),
        }
        access.info("%s", json.dumps(fields), extra={"fields": fields})


class Surroundings:
    """ASGI middleware.

    Args:
        app: the wrapped application.
        takes_files: whether a request goes to a route that receives files; other routes receive parameters, which are
            small.
        default_limit_mib: size limit of uploads until the settings are known.
    """

    def __init__(self, app: ASGIApp, takes_files: Callable[[Scope], bool], default_limit_mib: int = 2048) -> None:
        self._app, self._takes_files = app, takes_files
        self._default_limit_mib = default_limit_mib

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and stop the application; a failed start ends with a sentence instead of a stack trace."""
        failed = False

        async def sending(message: Message) -> None:
            nonlocal failed
            if message["type"] == "lifespan.startup.failed":
                # Starlette puts the stack trace there, which uvicorn would print
                failed, message = True, {**message, "message": ""}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:
            if not failed:
                raise
            tell_failure(error)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        request_id = begin_request(headers.get(HEADER.encode(), b"").decode("latin-1"))
        exchange = _Exchange(scope, request_id, time.perf_counter())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                given = message.get("headers", [])
                wanted = FOR_BROWSERS if exchange.route in SHARED_ROUTES else (*FOR_BROWSERS, *NOT_SHARED)
                more = [(name, value) for name, value in wanted if name not in {name.lower() for name, _ in given}]
                message["headers"] = [*given, *more, (HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            limited = _LimitedBody(receive, *await self._limit(scope, headers), exchange)
            await limited.check_announced(headers.get(b"content-length"))
            await self._app(scope, limited.receive, sending)
        except HTTPException as error:
            await error_response(error)(scope, receive, sending)
        except ClientDisconnect:
            logger.info("the client of request %s left", request_id)
        except Exception as error:
            asked = f"request {request_id}: {scope['method']} {scope['path']}"
            if status_of(error) == 500:
                logger.exception("%s failed", asked)
            else:
                logger.warning("%s: %s (%s)", asked, describe(error, status_of(error)), error)
            if not exchange.status:
                await error_response(error)(scope, receive, sending)
        finally:
            exchange.finish()

    async def _limit(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, HTTPException]:
        """Size limit of this request's body, and the error for a larger one.

        The body is received before a route can check the user, so files are received only from authenticated users.
        """
        services = getattr(scope["app"].state, "services", None)
        is_multipart = headers.get(b"content-type", b"").lower().startswith(b"multipart/")
        if not is_multipart or not self._takes_files(scope):  # whatever its content type, it would be kept in memory
            return SMALL_BODY_BYTES, _too_large(SMALL_BODY_BYTES)
        if services is not None and not await is_let_in(Request(scope), services.authenticator):
            return SMALL_BODY_BYTES, _stranger()
        most = (services.settings.upload_limit_mib if services else self._default_limit_mib) * MIB
        return most, _too_large(most)


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the request is larger than {most / MIB:g} MiB, which is the most that is taken here")


def _stranger() -> HTTPException:
    sentence = "this server takes files with a valid token alone: send the header Authorization: Bearer <token>"
    return HTTPException(401, sentence, {"WWW-Authenticate": "Bearer"})


class _LimitedBody:
    """Counts the bytes of a request's body, and stops at a limit."""

    def __init__(self, receive: Receive, most_bytes: int, refusal: HTTPException, exchange: _Exchange) -> None:
        self._receive = receive
        self._most, self._refusal = most_bytes, refusal
        self._exchange = exchange

    async def check_announced(self, content_length: bytes | None) -> None:
        """Refuse a body whose announced size exceeds the limit.

        Raises:
            HTTPException: 413, or 401 for an unauthenticated client.
        """
        if content_length and content_length.isdigit() and int(content_length) > self._most:
            await self._drain()
            raise self._refusal

    async def receive(self) -> Message:
        """See ASGI; stops a body that exceeds the limit.

        Raises:
            HTTPException: 413, or 401 for an unauthenticated client.
        """
        message = await self._receive()
        self._exchange.received += len(message.get("body", b""))
        if self._exchange.received > self._most:
            await self._drain()
            raise self._refusal
        return message

    async def _drain(self) -> None:
        drained = 0
        with anyio.move_on_after(DRAINING_SECONDS):
            while drained < DRAINED_BYTES:
                message = await self._receive()
                drained += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
