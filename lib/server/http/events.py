"""Publish/subscribe for page updates.

Routes and jobs mark a topic from any thread. Each subscriber receives the topics that were marked since its last
message, so that a slow one misses nothing and a busy topic costs no more than a quiet one.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

TOPICS = ("pool", "next", "job", "models", "activity", "system")
CASES = ("pool", "next", "activity")
TOPICS_OF_ADDRESSES = {
    "datastore": CASES,
    "activelearning": CASES,
    "leases": CASES,
    "batch": CASES,
    "model": ("next", "models"),
    "train": ("job",),
    "infer": ("next", "system"),
}
"""Topics that a modifying request changes, by the first part of its path."""
SECONDS_BETWEEN_TELLINGS = 0.5
"""Shortest interval between messages, since a training prints many lines."""


def topics_of(route: str) -> tuple[str, ...]:
    """The topics that a successful request to a route changes; none for a read-only route.

    >>> topics_of("/train/{model}")
    ('job',)
    """
    return TOPICS_OF_ADDRESSES.get(route.strip("/").split("/")[0], ())


class Changes:
    """The topics and their subscribers.

    Args:
        seconds_between: shortest time between two messages to a subscriber.
    """

    def __init__(self, seconds_between: float = SECONDS_BETWEEN_TELLINGS) -> None:
        self._seconds_between = seconds_between
        self._listeners: set[_Listener] = set()
        self._lock = threading.Lock()
        self._closed = False

    def mark(self, *topics: str) -> None:
        """Mark topics as changed; may be called from any thread.

        Raises:
            ValueError: for an unknown topic.
        """
        unknown = set(topics) - set(TOPICS)
        if unknown:
            raise ValueError(f"topics {sorted(unknown)} are unknown; valid: {', '.join(TOPICS)}")
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(topics)

    def close(self) -> None:
        """End all subscriptions, so that open connections do not delay the server's stop."""
        self._closed = True
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.tell(())

    async def listen(self) -> AsyncIterator[list[str]]:
        """The marked topics, in the order of ``TOPICS``, whenever there are any; ends with the server."""
        listener = _Listener(asyncio.get_running_loop())
        with self._lock:
            self._listeners.add(listener)
        try:
            while not self._closed:
                await listener.woken.wait()
                if not self._closed:
                    await asyncio.sleep(self._seconds_between)
                topics = listener.take()
                if topics:
                    yield topics
        finally:
            with self._lock:
                self._listeners.discard(listener)


class _Listener:
    """One subscriber; all methods but ``tell`` are called on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._topics: set[str] = set()
        self.woken = asyncio.Event()

    def tell(self, topics: tuple[str, ...]) -> None:
        try:
            self._loop.call_soon_threadsafe(self._wake, topics)
        except RuntimeError:  # the event loop has ended, and the connection with it
            return

    def take(self) -> list[str]:
        self.woken.clear()
        topics, self._topics = self._topics, set()
        return [topic for topic in TOPICS if topic in topics]

    def _wake(self, topics: tuple[str, ...]) -> None:
        self._topics.update(topics)
        self.woken.set()


@contextmanager
def closed_by_signals(changes: Changes) -> Iterator[None]:
    """Within the block, SIGTERM and SIGINT first end the subscriptions and then have their usual effect.

    uvicorn waits for open connections before it stops the app, and these never end by themselves.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, frame: FrameType | None) -> None:
        changes.close()
        if callable(before[number]):
            before[number](number, frame)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def called_by_signal(name: str, call: Callable[[], None]) -> Iterator[None]:
    """Within the block, a signal (such as ``SIGUSR1``) calls ``call``, if the platform has this signal."""
    number = getattr(signal, name, None)
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(number, before)
