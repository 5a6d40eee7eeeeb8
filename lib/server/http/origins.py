"""Restricts which web pages may call the server from a browser: its own, and those that the administrator names.

A browser lets any page send simple requests (forms, also with files) to any server, and only hides the response from
the page. A modifying request is therefore refused if it comes from another page. Without tokens, a page could also
resolve its own host name to 127.0.0.1 (DNS rebinding) and pass as the server's own page: a server that listens on this
machine only therefore refuses requests whose Host header names another machine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

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
    """ASGI middleware; it reads the settings at the first request, since they are not known before.

    Args:
        app: the wrapped application.
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
        try:
            hosts = _values(scope, b"host")
            _check_addresses(hosts)
            self._check_origin(scope["method"], _values(scope, b"origin"), hosts, _values(scope, b"sec-fetch-site"))
            if not services.authenticator.enabled:
                self._check_host(scope, hosts)
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

    def _check_origin(self, method: str, origins: list[str], hosts: list[str], sites: list[str]) -> None:
        """Check every value of the header, which may be repeated."""
        if method in SAFE_METHODS or (origins and all(origin in (self._allowed or ()) for origin in origins)):
            return
        for origin in origins:
            at = split_address(origin)
            if at is None or [at.netloc.lower()] != [host.lower() for host in hosts]:
                raise ForbiddenError(f"pages of {origin[:200]!r} may not call this server (cors_origins)")
        # some requests of browsers carry no Origin; which page they come from stands here, and no page can change it
        for site in (part.strip().lower() for value in sites for part in value.split(",")):
            if site in OTHER_PAGES:
                raise ForbiddenError(f"pages of other servers ({site}) may not call this server (cors_origins)")

    def _check_host(self, scope: Scope, hosts: list[str]) -> None:
        client = (scope.get("client") or ("127.0.0.1",))[0]
        if not is_loopback(client):
            return
        named = {at.hostname for origin in self._allowed or () if (at := split_address(origin)) is not None}
        for host in hosts or [""]:
            name = (urlsplit(f"//{host}").hostname or "").lower()
            if name not in LOCAL_NAMES and name not in named and not is_address(name):
                raise ForbiddenError(
                    f"this server asks for no token and answers on this machine only as localhost, not as "
                    f"{name[:200]!r}; an administrator can allow the name (cors_origins)"
                )


def _values(scope: Scope, header: bytes) -> list[str]:
    """All values of a header, which may be repeated."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name == header]


def split_address(address: str) -> SplitResult | None:
    """The parts of an address; None for an invalid one, such as ``http://[`` and ``http://host:port``."""
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 (raises for what is no port)
    except ValueError:
        return None
    return parts


def _check_addresses(hosts: Iterable[str]) -> None:
    """Refuse an invalid Host header before it is used in an address.

    Raises:
        ForbiddenError: quoting it.
    """
    for host in hosts:
        if split_address(f"//{host}") is None:
            raise ForbiddenError(f"the header Host is {host[:200]!r}, which is no address; valid: name or name:port")


def allowed_origins(ours: Iterable[str]) -> frozenset[str]:
    """The origins of this project's and MONAI Label's settings, in the form that browsers send (no trailing slash)."""
    stock = (str(origin) for origin in stock_settings.MONAI_LABEL_CORS_ORIGINS or ())
    return frozenset(origin.rstrip("/") for origin in (*ours, *stock))
