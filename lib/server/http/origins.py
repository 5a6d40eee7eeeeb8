"""Which web pages may call the server from a browser: its own, and those that the administrator names.

A browser lets any page send simple requests (forms, also with files) to any server, and only keeps the answer from the
page. So a request that changes something is refused when it comes from another page. Where no token is asked for, a
page could also give its own name this machine's address (DNS rebinding) and pass for the server's own page: so on
this machine the server answers only under this machine's names.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from urllib.parse import urlsplit

from monailabel.config import settings as stock_settings
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.server.http.errors import ForbiddenError, error_response
from lib.server.http.proxies import is_address, is_loopback

logger = logging.getLogger("unetr.server")

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
LOCAL_NAMES = ("localhost",)
# Values of Sec-Fetch-Site; "none" is a request that the user made without a page.
OTHER_PAGES = ("cross-site", "same-site")


class Origins:
    """ASGI middleware; it reads the settings when the first request comes, since they are not known before.

    Args:
        app: what it surrounds.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._allowed: frozenset[str] | None = None
        self._cors: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        services = scope["app"].state.services
        if self._allowed is None:
            self._open_to(allowed_origins(services.settings.cors_origins))
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check_origin(scope["method"], headers)
            if not services.authenticator.enabled:
                self._check_host(scope, headers.get(b"host", ""))
        except ForbiddenError as error:
            client = (scope.get("client") or ("unknown",))[0]
            logger.info("refused %s %s from %s: 403 %s", scope["method"], scope["path"], client, error)
            await error_response(error)(scope, receive, send)
            return
        await self._cors(scope, receive, send)

    def _open_to(self, origins: frozenset[str]) -> None:
        self._allowed = origins
        self._cors = CORSMiddleware(
            self._app,
            allow_origins=sorted(origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
            expose_headers=["X-Request-ID", "Retry-After", "Content-Disposition"],
        )

    def _check_origin(self, method: str, headers: dict[bytes, str]) -> None:
        origin = headers.get(b"origin")
        if method in SAFE_METHODS or origin in (self._allowed or ()):
            return
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get(b"host", "").lower():
            raise ForbiddenError(f"pages of {origin[:200]!r} may not call this server (cors_origins)")
        # some requests of browsers carry no Origin; which page they come from stands here, and no page can change it
        site = headers.get(b"sec-fetch-site", "").strip().lower()
        if site in OTHER_PAGES:
            raise ForbiddenError(f"pages of other servers ({site}) may not call this server (cors_origins)")

    def _check_host(self, scope: Scope, host: str) -> None:
        client = (scope.get("client") or ("127.0.0.1",))[0]
        name = (urlsplit(f"//{host}").hostname or "").lower()
        named = {urlsplit(origin).hostname for origin in self._allowed or ()}
        if is_loopback(client) and name not in LOCAL_NAMES and name not in named and not is_address(name):
            raise ForbiddenError(
                f"this server asks for no token and answers on this machine only as localhost, not as {name[:200]!r}; "
                "an administrator can allow the name (cors_origins)"
            )


def allowed_origins(ours: Iterable[str]) -> frozenset[str]:
    """The origins of our setting and MONAI Label's, in the form that browsers send (without a slash at the end)."""
    stock = (str(origin) for origin in stock_settings.MONAI_LABEL_CORS_ORIGINS or ())
    return frozenset(origin.rstrip("/") for origin in (*ours, *stock))
