"""One inference at a time on each device; a bounded number wait, the rest are told when to come back.

What is computed ahead takes the turns that nobody wants, and gives them back as soon as somebody does.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from lib.infers.interruption import InterruptedWork, giving_way
from lib.server.http.errors import BusyError
from lib.server.work.pause import Pause

Result = TypeVar("Result")
# How much the latest inference counts in the mean that Retry-After is estimated with.
WEIGHT_OF_LATEST = 0.3


@dataclass
class _Lane:
    """What runs and waits on one device. Only the event loop's thread touches it."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="inference"))
    inside: int = 0
    mean_seconds: float = 1.0
    left: asyncio.Condition = field(default_factory=asyncio.Condition)
    ahead: tuple[object, threading.Event] | None = None


class InferenceQueue:
    """Runs blocking work off the event loop, one piece at a time on each device, first come first served.

    Args:
        size: how many may wait on a device besides the one that runs.
        on_busy: called with True when the first comes in and with False when the last has left.
        pause: asks trainings on the same device to stand still meanwhile.
    """

    def __init__(self, size: int, on_busy: Callable[[bool], None] | None = None, pause: Pause | None = None) -> None:
        self._size = size
        self._on_busy = on_busy
        self._pause = pause or Pause()
        self._lanes: dict[str, _Lane] = {}

    @property
    def waiting(self) -> int:
        """How many wait now, on all devices."""
        return sum(max(0, lane.inside - 1) for lane in self._lanes.values())

    @property
    def busy(self) -> bool:
        """Whether anybody computes or waits; what is computed ahead does not count."""
        return any(lane.inside for lane in self._lanes.values())

    @asynccontextmanager
    async def slot(self, device: str, what: object = None) -> AsyncIterator[DeviceSlot]:
        """Wait for a device; what runs inside has it alone.

        Args:
            device: which.
            what: what is to be computed. Where the same is being computed ahead, that is waited for; anything else
                that is computed ahead is ended.

        Raises:
            BusyError: at once, when too many wait already.
        """
        lane = self._lanes.setdefault(device, _Lane())
        if lane.inside > self._size:
            seconds = max(1, math.ceil(lane.mean_seconds * lane.inside))
            message = f"{lane.inside} inferences run or wait on {device}; come back in {seconds} s"
            raise BusyError(message, seconds)
        self._enter(lane)
        if lane.ahead is not None and lane.ahead[0] != what:
            lane.ahead[1].set()
        try:
            with self._pause.asked(device):
                async with lane.lock:
                    yield DeviceSlot(lane)
        finally:
            await self._leave(lane)

    @asynccontextmanager
    async def idle_slot(self, device: str, what: object) -> AsyncIterator[DeviceSlot]:
        """Wait until nobody wants a device, and take it until somebody does.

        Args:
            device: which.
            what: what is computed ahead; see :meth:`slot`.

        Raises:
            InterruptedWork: from inside, before the next window, when somebody else wants the device.
        """
        lane = self._lanes.setdefault(device, _Lane())
        wanted = threading.Event()
        async with lane.left:
            await lane.left.wait_for(lambda: lane.inside == 0 and lane.ahead is None)
        lane.ahead = (what, wanted)
        try:
            async with lane.lock:
                with giving_way(lambda: _give_way(wanted)):
                    yield DeviceSlot(lane)
        finally:
            lane.ahead = None
            async with lane.left:
                lane.left.notify_all()

    def run_when_idle(
        self,
        loop: asyncio.AbstractEventLoop,
        device: str,
        what: object,
        work: Callable[[], Result],
        patience_seconds: float,
    ) -> Result:
        """Run ``work`` in an idle slot of a device, and wait for its result; for threads other than the event loop's.

        Args:
            loop: the event loop that the queue is used on.
            device: which.
            what: what is computed ahead; see :meth:`slot`.
            work: what runs in the device's own thread.
            patience_seconds: how long to wait for a device that others use.

        Raises:
            InterruptedWork: when the device is not idle in time, somebody else wants it meanwhile, or the server stops.
        """
        task = asyncio.run_coroutine_threadsafe(self._run_when_idle(device, what, work, patience_seconds), loop)
        try:
            return task.result()
        except CancelledError as error:
            raise InterruptedWork from error

    async def _run_when_idle(
        self, device: str, what: object, work: Callable[[], Result], patience_seconds: float
    ) -> Result:
        async with AsyncExitStack() as stack:
            with anyio.move_on_after(patience_seconds) as waited:
                slot = await stack.enter_async_context(self.idle_slot(device, what))
            if waited.cancelled_caught:
                raise InterruptedWork
            return await slot.run(work)

    def _enter(self, lane: _Lane) -> None:
        if not self.busy and self._on_busy is not None:
            self._on_busy(True)
        lane.inside += 1

    async def _leave(self, lane: _Lane) -> None:
        lane.inside -= 1
        if not self.busy and self._on_busy is not None:
            self._on_busy(False)
        async with lane.left:
            lane.left.notify_all()


def _give_way(wanted: threading.Event) -> None:
    if wanted.is_set():
        raise InterruptedWork


class DeviceSlot:
    """The right to compute on a device."""

    def __init__(self, lane: _Lane) -> None:
        self._lane = lane

    async def run(self, work: Callable[[], Result]) -> Result:
        """Run ``work`` in the device's own thread.

        Neither waiting nor computing takes a thread from other requests. It is always the same one, since each thread
        that computes keeps buffers of its own: spread over a pool of forty, that is a gigabyte.
        """
        start = time.monotonic()
        try:
            context = contextvars.copy_context()
            return await asyncio.get_running_loop().run_in_executor(self._lane.thread, context.run, work)
        finally:
            seconds = time.monotonic() - start
            self._lane.mean_seconds += WEIGHT_OF_LATEST * (seconds - self._lane.mean_seconds)
