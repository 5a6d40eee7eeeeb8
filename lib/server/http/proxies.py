"""The client's address: the peer of the connection, or the address that a configured reverse proxy states.

Anybody can send ``X-Forwarded-For``. By default, uvicorn trusts it from every program on this machine, so that a page
in a local browser could claim to come from elsewhere and evade the checks for local clients.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

LOOPBACK = "127.0.0.1"


class Clients:
    """ASGI middleware; it reads the settings at the first request, since they are not known before.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._trusting: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if self._trusting is None:
            services = getattr(scope["app"].state, "services", None)
            trusted = services.settings.trusted_proxies if services else ()
            self._trusting = ProxyHeadersMiddleware(self._app, list(trusted))  # type: ignore[arg-type, assignment]
        scope["client"] = peer_of(scope)
        await self._trusting(scope, receive, send)  # type: ignore[misc]


def peer_of(scope: Scope) -> tuple[str, int] | None:
    """The peer of the connection.

    A connection to a loopback address comes from this machine, whatever a server in front of the app derived from the
    request's headers.
    """
    client: tuple[str, int] | None = scope.get("client")
    at = (scope.get("server") or ("",))[0]
    if is_loopback(str(at)) and not is_loopback(client[0] if client else ""):
        return LOOPBACK, 0
    return client


def is_address(name: str) -> bool:
    """Whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if address == "localhost":
        return True
    if not is_address(address):
        return False
    parsed = ipaddress.ip_address(address)
    inside = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None  # ::ffff:127.0.0.1
    return (inside or parsed).is_loopback


def is_among(address: str, networks: Sequence[str]) -> bool:
    """Whether an IP address is one of the addresses, or in one of the networks (such as ``10.0.0.0/8``)."""
    if not networks or not is_address(address):
        return False
    return any(ipaddress.ip_address(address) in ipaddress.ip_network(network) for network in networks)
