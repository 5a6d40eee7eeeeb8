"""Limits on connections: their number, and how slowly a client may send or receive.

Uvicorn keeps a connection with an incomplete header for ever, and a few hundred of them exhaust the file descriptors of
a process. Its protocol is extended here: a header must be complete within some seconds, a body must arrive at a minimum
rate, and a response must be accepted. If there are too many connections, the oldest idle ones are closed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import h11
import uvicorn
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from lib.server.http.proxies import is_among

logger = logging.getLogger("unetr.server")

CHECK_SECONDS = 1.0
SECONDS_TO_READ_A_REFUSAL = 0.5
BODY_BYTES_A_SECOND = 1024
# Connections that the operating system queues before the process accepts them.
BACKLOG = 128
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """Limits on connections.

    Attributes:
        connections: largest number at a time.
        per_client: largest number from one address at a time.
        header_seconds: time limit until a request's header is complete; an idle connection is kept as long.
        body_seconds: time limit for a body, plus one second for each KiB received; also the time limit in which a
            client must accept a part of its response.
        proxies: addresses and networks that represent many clients, and have no limit of their own.
    """

    connections: int
    per_client: int
    header_seconds: float
    body_seconds: float
    proxies: tuple[str, ...] = ()


class LimitedProtocol(H11Protocol):
    """Uvicorn's connection, with time limits.

    Args:
        crowd: all connections of the server.
        config, server_state, app_state, _loop: see uvicorn.
    """

    def __init__(
        self,
        crowd: Crowd,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        # after uvicorn's 5 seconds, a client that asks every 5 seconds meets a connection that is being closed
        self.timeout_keep_alive = max(config.timeout_keep_alive, math.ceil(crowd.limits.header_seconds))
        self._crowd = crowd
        self._refused = False
        self._phase: object = h11.IDLE
        self._since = time.monotonic()
        self._received = 0
        self._unsent, self._unsent_since = 0, self._since

    @property
    def waits_for_header(self) -> bool:
        """Whether the connection is idle."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See uvicorn; a connection beyond the limits is refused."""
        super().connection_made(transport)
        if not self._crowd.admit(self):
            self._refuse()

    def _refuse(self) -> None:
        """Respond that there are too many connections; the connection stays open until the client has read this."""
        self._refused = True
        self.transport.write(TOO_MANY)
        self.loop.call_later(SECONDS_TO_READ_A_REFUSAL, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See uvicorn."""
        if self._refused:
            return
        self._received += len(data)
        super().data_received(data)
        self._look_at_phase()

    def on_response_complete(self) -> None:
        """See uvicorn; the time limit of the next header starts."""
        super().on_response_complete()
        self._look_at_phase()

    def _look_at_phase(self) -> None:
        if self._phase is not self.conn.their_state:
            self._phase, self._since, self._received = self.conn.their_state, time.monotonic(), 0

    def end_if_overdue(self, now: float, limits: Limits) -> None:
        """Close the connection if the client exceeds a time limit."""
        if self._stuck(now) > limits.body_seconds:
            logger.info("closed a connection of %s: it takes nothing of its answer", self.address)
            self.transport.abort()
        elif self._phase is h11.IDLE and now - self._since > limits.header_seconds:
            if self.waits_for_header:
                self.close(TIMED_OUT if self._received else b"")
        elif self._phase is h11.SEND_BODY:
            if self.flow.read_paused or (self.cycle is not None and self.cycle.waiting_for_100_continue):
                self._since += self._crowd.check_seconds  # the server and not the client causes this delay
            elif now - self._since > limits.body_seconds + self._received / BODY_BYTES_A_SECOND:
                logger.info("closed a connection of %s: its request comes too slowly", self.address)
                answered = self.cycle is not None and self.cycle.response_started
                self.close(b"" if answered else TIMED_OUT)

    def _stuck(self, now: float) -> float:
        """Seconds for which the client has accepted nothing of a response."""
        left = self.transport.get_write_buffer_size()
        if not left or left != self._unsent:
            self._unsent, self._unsent_since = left, now
        return now - self._unsent_since

    @property
    def address(self) -> str:
        """Address of the client."""
        return self.client[0] if self.client else "unknown"

    def close(self, farewell: bytes = b"") -> None:
        """End the connection."""
        if not self.transport.is_closing():
            self.transport.write(farewell)
            self.transport.close()


class Connection(Protocol):
    """A connection that counts for the limits: one of HTTP, or one in its TLS handshake."""

    loop: asyncio.AbstractEventLoop
    transport: Any

    @property
    def cycle(self) -> Any:
        """The latest request; None if there was none."""

    @property
    def waits_for_header(self) -> bool:
        """Whether the connection is idle."""

    @property
    def address(self) -> str:
        """Address of the client."""

    def end_if_overdue(self, now: float, limits: Limits) -> None:
        """Close the connection if the client exceeds a time limit."""


class Crowd:
    """All connections of a server.

    Args:
        limits: the limits.
        check_seconds: interval between two checks of the time limits.
    """

    def __init__(self, limits: Limits, check_seconds: float = CHECK_SECONDS) -> None:
        self.limits, self.check_seconds = limits, check_seconds
        self._all: dict[Connection, str] = {}
        self._of_client: dict[str, dict[Connection, None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._all)

    @property
    def waiting(self) -> int:
        """Number of idle connections, including those with an incomplete header."""
        return sum(connection.waits_for_header for connection in list(self._all))

    def make(self, **options: Any) -> LimitedProtocol:
        """Create a connection; uvicorn's protocol factory."""
        return LimitedProtocol(self, **options)

    def admit(self, connection: Connection) -> bool:
        """Accept a connection; False if there are too many and no idle one can be closed."""
        address = connection.address
        own = self._of_client.get(address, {})
        too_many_of_one = len(own) >= self.limits.per_client and not is_among(address, self.limits.proxies)
        if too_many_of_one and not self._make_room(own):
            return False
        if len(self._all) >= self.limits.connections:
            busiest = max(self._of_client.values(), key=len)
            if not self._make_room(busiest) and not self._make_room(self._all):
                return False
        self._all[connection] = address
        self._of_client.setdefault(address, {})[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(self.check_seconds, self._look, connection.loop)
        return True

    def leave(self, connection: Connection) -> None:
        """Remove a closed connection."""
        address = self._all.pop(connection, None)
        if address is not None:
            self._of_client[address].pop(connection)
            if not self._of_client[address]:
                del self._of_client[address]

    def _make_room(self, among: Iterable[Connection]) -> bool:
        """Close the oldest idle connection; those without any request come first."""
        waiting = [connection for connection in among if connection.waits_for_header]
        oldest = next((c for c in waiting if c.cycle is None), next(iter(waiting), None))
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.transport.abort()
        return True

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        now = time.monotonic()
        for connection in list(self._all):
            connection.end_if_overdue(now, self.limits)
        self._timer = loop.call_later(self.check_seconds, self._look, loop) if self._all else None


def serving_uvicorn() -> uvicorn.Server | None:
    """The uvicorn instance that serves this app, found through its SIGTERM handler; None under another server."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None
