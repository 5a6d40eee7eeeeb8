"""Limits on connections: how many there may be, and how slowly a client may send or read.

Uvicorn keeps a connection with half a header for ever, and a few hundred of them take all that a process may open. Its
protocol is extended here: a header has to be there within some seconds, a body has to come at a certain rate, an answer
has to be taken, and where there are too many connections the oldest of those that ask for nothing make room.
"""

from __future__ import annotations

import asyncio
import logging
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
# Connections that the system accepts for the process before it has looked at one of them.
BACKLOG = 128
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
TOO_MANY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True)
class Limits:
    """What connections may take.

    Attributes:
        connections: most of them at a time.
        per_client: most of one address at a time.
        header_seconds: longest time until a request's header is complete.
        body_seconds: longest time for a body, beside one second for each KiB that came; and longest time in which a
            client takes nothing of its answer.
        proxies: addresses and networks that speak for many clients, and have no limit of their own.
    """

    connections: int
    per_client: int
    header_seconds: float
    body_seconds: float
    proxies: tuple[str, ...] = ()


class LimitedProtocol(H11Protocol):
    """Uvicorn's connection, which knows for how long it has been waiting for its client.

    Args:
        crowd: all connections of the server.
        config, server_state, app_state, _loop: as uvicorn's.
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
        self._crowd = crowd
        self._refused = False
        self._phase: object = h11.IDLE
        self._since = time.monotonic()
        self._received = 0
        self._unsent, self._unsent_since = 0, self._since

    @property
    def waits_for_header(self) -> bool:
        """Whether no request is being read or answered."""
        return self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """As uvicorn's; a connection too many is refused."""
        super().connection_made(transport)
        if not self._crowd.admit(self):
            self._refuse()

    def _refuse(self) -> None:
        """Say that there are too many; the connection stays until that has been read, or its request would undo it."""
        self._refused = True
        self.transport.write(TOO_MANY)
        self.loop.call_later(SECONDS_TO_READ_A_REFUSAL, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """As uvicorn's."""
        self._crowd.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As uvicorn's."""
        if self._refused:
            return
        self._received += len(data)
        super().data_received(data)
        self._look_at_phase()

    def on_response_complete(self) -> None:
        """As uvicorn's; the next header's time begins."""
        super().on_response_complete()
        self._look_at_phase()

    def _look_at_phase(self) -> None:
        if self._phase is not self.conn.their_state:
            self._phase, self._since, self._received = self.conn.their_state, time.monotonic(), 0

    def end_if_overdue(self, now: float, limits: Limits) -> None:
        """Close the connection of a client that takes too long."""
        if self._stuck(now) > limits.body_seconds:
            logger.info("closed a connection of %s: it takes nothing of its answer", self.address)
            self.transport.abort()
        elif self._phase is h11.IDLE and now - self._since > limits.header_seconds:
            if self.waits_for_header:
                self.close(TIMED_OUT if self._received else b"")
        elif self._phase is h11.SEND_BODY:
            if self.flow.read_paused or (self.cycle is not None and self.cycle.waiting_for_100_continue):
                self._since += self._crowd.check_seconds  # the client waits for this server
            elif now - self._since > limits.body_seconds + self._received / BODY_BYTES_A_SECOND:
                logger.info("closed a connection of %s: its request comes too slowly", self.address)
                answered = self.cycle is not None and self.cycle.response_started
                self.close(b"" if answered else TIMED_OUT)

    def _stuck(self, now: float) -> float:
        """For how many seconds the client has taken nothing of an answer that waits for it."""
        left = self.transport.get_write_buffer_size()
        if not left or left != self._unsent:
            self._unsent, self._unsent_since = left, now
        return now - self._unsent_since

    @property
    def address(self) -> str:
        """The other end of the connection."""
        return self.client[0] if self.client else "unknown"

    def close(self, farewell: bytes = b"") -> None:
        """End the connection."""
        if not self.transport.is_closing():
            self.transport.write(farewell)
            self.transport.close()


class Connection(Protocol):
    """What is counted: a connection of HTTP, or one whose encryption is not agreed on yet."""

    loop: asyncio.AbstractEventLoop
    transport: Any

    @property
    def cycle(self) -> Any:
        """The request that was read last; None before the first."""

    @property
    def waits_for_header(self) -> bool:
        """Whether no request is being read or answered."""

    @property
    def address(self) -> str:
        """The other end."""

    def end_if_overdue(self, now: float, limits: Limits) -> None:
        """Close the connection of a client that takes too long."""


class Crowd:
    """All connections of a server.

    Args:
        limits: what they may take.
        check_seconds: time between two checks of how long they have been waiting.
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
        """How many ask for nothing, or have not finished their header."""
        return sum(connection.waits_for_header for connection in list(self._all))

    def make(self, **options: Any) -> LimitedProtocol:
        """A connection, as uvicorn asks for one."""
        return LimitedProtocol(self, **options)

    def admit(self, connection: Connection) -> bool:
        """Take a connection in; False when there are too many and none that could make room."""
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
        """Forget a connection."""
        address = self._all.pop(connection, None)
        if address is not None:
            self._of_client[address].pop(connection)
            if not self._of_client[address]:
                del self._of_client[address]

    def _make_room(self, among: Iterable[Connection]) -> bool:
        """End the oldest connection that asks for nothing, first of those that never have."""
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
    """The uvicorn that serves this app, found as what handles SIGTERM; None under another server."""
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return server if isinstance(server, uvicorn.Server) else None
