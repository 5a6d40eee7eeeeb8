"""TLS for uvicorn with connection limits: an unfinished handshake is limited like an incomplete header."""

from __future__ import annotations

import asyncio
import logging
import ssl
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, cast

from uvicorn.protocols.utils import get_remote_addr

from lib.server.http.connections import BACKLOG, Crowd, LimitedProtocol, Limits, serving_uvicorn

logger = logging.getLogger("unetr.server")


def limit_connections(limits: Limits) -> Crowd | None:
    """Make the starting uvicorn create connections with limits.

    MONAI Label's command line starts uvicorn and has no option for its protocol. Uvicorn opens its socket after the app
    has started, and reads the protocol from its configuration then. Its own TLS is disabled, since its protocol
    receives a connection only after the handshake.

    Returns:
        The connections; None under another server, which has to limit them itself.
    """
    server = serving_uvicorn()
    if server is None:
        logger.warning("connections are not limited: this app is not served by uvicorn; limit them in front of it")
        return None
    crowd, context = Crowd(limits), server.config.ssl if server.config.is_ssl else None
    server.config.http_protocol_class = protocol_factory(crowd, context)  # type: ignore[assignment]
    server.config.backlog = BACKLOG
    if context is not None:
        server.config.ssl = None
        logger.info("connections are encrypted (TLS): the address begins with https://")
    return crowd


def protocol_factory(crowd: Crowd, context: ssl.SSLContext | None) -> Callable[..., asyncio.Protocol]:
    """A factory of connections, as uvicorn requires.

    Args:
        crowd: the connections of the server.
        context: the certificate; None without encryption.
    """
    if context is None:
        return crowd.make

    def make(**options: Any) -> Handshake:
        return Handshake(crowd, context, partial(crowd.make, **options), asyncio.get_running_loop())

    return make


class Handshake(asyncio.Protocol):
    """A connection in its TLS handshake, which becomes an HTTP connection afterwards.

    Args:
        crowd: all connections of the server.
        context: the server's certificate.
        make: creates the HTTP connection.
        loop: event loop.
    """

    cycle: ClassVar[None] = None
    waits_for_header: ClassVar[bool] = True

    def __init__(
        self,
        crowd: Crowd,
        context: ssl.SSLContext,
        make: Callable[[], LimitedProtocol],
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.loop = loop
        self._crowd, self._context, self._make = crowd, context, make
        self._since = time.monotonic()
        self._client: tuple[str, int] | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        """Address of the client."""
        return self._client[0] if self._client else "unknown"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept or close the connection: beyond the limits, no response is possible before TLS."""
        self.transport = cast(asyncio.Transport, transport)
        self._client = get_remote_addr(self.transport)
        if not self._crowd.admit(self):
            self.transport.abort()
            return
        self.transport.pause_reading()
        self._task = self.loop.create_task(self._encrypt())

    def end_if_overdue(self, now: float, limits: Limits) -> None:
        """Close the connection if the client exceeds a time limit."""
        if now - self._since > limits.header_seconds:
            self.transport.abort()

    async def _encrypt(self) -> None:
        first, seconds = _First(), self._crowd.limits.header_seconds
        times = {"ssl_handshake_timeout": seconds}
        if sys.version_info >= (3, 11):
            times["ssl_shutdown_timeout"] = seconds
        try:
            encrypted = await self.loop.start_tls(
                self.transport, first, self._context, server_side=True, **cast(Any, times)
            )
        except OSError as error:  # includes data that is not TLS
            logger.debug("no TLS connection with %s: %s", self.address, error)
            return
        finally:
            self._crowd.leave(self)
        if encrypted is None or encrypted.is_closing():  # asyncio returns this if the client has disconnected
            return
        protocol = self._make()
        encrypted.set_protocol(protocol)
        protocol.connection_made(encrypted)
        first.hand_over(protocol)


class _First(asyncio.Protocol):
    """Buffers data that arrive between the end of the handshake and the start of the HTTP protocol."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._ended = False

    def data_received(self, data: bytes) -> None:
        self._data.append(data)

    def eof_received(self) -> None:
        self._ended = True

    def hand_over(self, protocol: LimitedProtocol) -> None:
        """Pass the buffered data to a protocol."""
        for data in self._data:
            protocol.data_received(data)
        if self._ended:
            protocol.eof_received()
