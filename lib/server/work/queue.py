"""The inference queue: requests wait for a device without a thread; if too many wait, others get 503 and Retry-After.

``lib.infers.devices.schedule`` assigns the devices. Background work uses devices without foreground work, and releases
them as soon as there is some.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import anyio
import torch

from lib.infers.devices.lane import Lane, computing_on
from lib.infers.devices.lanes import Lanes
from lib.infers.devices.read_ahead import ReadingAhead
from lib.infers.devices.schedule import Forecast, Work
from lib.infers.interruption import InterruptedWork, interruptible_by
from lib.infers.request import InferRequest
from lib.server.http.errors import BusyError
from lib.server.priority import give_requests_priority
from lib.server.tasks import InferenceTask
from lib.server.work.pause import Pause

Result = TypeVar("Result")


class InferenceQueue:
    """Runs blocking work outside of the event loop, one item at a time on each lane, first come first served.

    Args:
        size: number of requests that may wait, besides the running ones.
        lanes: the devices.
        pause: asks trainings on the same device to pause meanwhile.
    """

    def __init__(self, size: int, lanes: Lanes, pause: Pause | None = None) -> None:
        self.lanes = lanes
        self._size = size
        self._pause = pause or Pause()
        self._threads: dict[str, ThreadPoolExecutor] = {}
        # for each device, one image is read in advance and another one is completed afterwards
        self._ahead = asyncio.Semaphore(sum(1 for _ in lanes))
        self._places_to_finish: dict[str, asyncio.Semaphore] = {}
        self._finishing: dict[Hashable, asyncio.Event] = {}

    @property
    def waiting(self) -> int:
        """Number of waiting requests, for all devices."""
        return self.lanes.waiting()

    @property
    def busy(self) -> bool:
        """Whether any foreground work runs or waits."""
        return any(not self.lanes.is_idle(str(lane.device)) for lane in self.lanes)

    def forecast(self, task: InferenceTask, request: InferRequest) -> Forecast:
        """The needs of a request, if there are several devices to choose from."""
        return task.forecast(request) if self.lanes.several else Forecast()

    @asynccontextmanager
    async def slot(
        self,
        device: torch.device | None = None,
        what: Hashable = None,
        forecast: Forecast | None = None,
        read: Callable[[], Any] | None = None,
    ) -> AsyncIterator[DeviceSlot]:
        """Wait for a device, which is held exclusively within the block.

        Args:
            device: None for the one that is expected to finish first.
            what: identity of the result. If the same result is being computed, including in the background, its end is
                awaited; other background work yields.
            forecast: needs of the request.
            read: runs in another thread while the device is awaited, if there is a place for it; its result is the
                slot's ``ahead``.

        Raises:
            BusyError: at once, if too many requests wait.
            DeviceError: if no suitable device works.
        """
        known = forecast or Forecast()
        work = self.lanes.work(device, what, known.weights, known.seconds)
        inside = self.lanes.foreground_count(device)
        if inside >= self._size + len(work.lanes):
            seconds = self.lanes.seconds_until_free(device)
            seconds = max(1, math.ceil(seconds)) if math.isfinite(seconds) else 1
            where = ", ".join(work.lanes)
            raise BusyError(f"{inside} inferences run or wait on {where}; come back in {seconds} s", seconds)
        async with self._granted(work, read) as slot:
            yield slot

    @asynccontextmanager
    async def idle_slot(
        self, device: torch.device | None, what: Hashable, forecast: Forecast | None = None
    ) -> AsyncIterator[DeviceSlot]:
        """Wait until a device is idle, and hold it until foreground work needs it.

        Args:
            device: None for any.
            what: identity of the result; see :meth:`slot`.
            forecast: needs of the work.

        Raises:
            InterruptedWork: inside of the block, before the next window, if foreground work needs the device.
        """
        known = forecast or Forecast()
        work = self.lanes.work(device, what, known.weights, known.seconds, ahead=True)

        def give_way() -> None:
            if work.ends:
                raise InterruptedWork

        async with self._granted(work) as slot:
            with interruptible_by(give_way):
                yield slot

    def run_when_idle(
        self,
        loop: asyncio.AbstractEventLoop,
        device: torch.device | None,
        what: Hashable,
        work: Callable[[], Result],
        patience_seconds: float,
    ) -> Result:
        """Run ``work`` in an idle slot of a device, and wait for its result; for threads other than the event loop's.

        Args:
            loop: the event loop of the queue.
            device: None for any.
            what: identity of the result; see :meth:`slot`.
            work: function that runs in the device's own thread.
            patience_seconds: time limit for waiting for an idle device.

        Raises:
            InterruptedWork: if the device is not idle in time, foreground work needs it meanwhile, or the server stops.
        """
        task = asyncio.run_coroutine_threadsafe(self._run_when_idle(device, what, work, patience_seconds), loop)
        try:
            return task.result()
        except CancelledError as error:
            raise InterruptedWork from error

    async def _run_when_idle(
        self, device: torch.device | None, what: Hashable, work: Callable[[], Result], patience_seconds: float
    ) -> Result:
        async with AsyncExitStack() as stack:
            with anyio.move_on_after(patience_seconds) as waited:
                slot = await stack.enter_async_context(self.idle_slot(device, what))
            if waited.cancelled_caught:
                raise InterruptedWork
            return await slot.run(work)

    @asynccontextmanager
    async def _granted(self, work: Work, read: Callable[[], Any] | None = None) -> AsyncIterator[DeviceSlot]:
        slot = DeviceSlot(self, work)
        try:
            granted = self.lanes.enter(work)
            if read is None or granted.done():
                await slot.wait(granted)
            else:
                async with ReadingAhead(self._ahead, read) as reading:
                    await slot.wait(granted)
                    slot.ahead = await reading.result()
            yield slot
        finally:
            self.lanes.leave(work, slot.finished)

    @asynccontextmanager
    async def finishing(self, lane: Lane, what: Hashable) -> AsyncIterator[Finish]:
        """Wait for a place to complete what a lane has computed, after the previous item.

        Args:
            lane: the lane, which may be released as soon as the place is available.
            what: see :meth:`slot`; requests for the same result wait for its end.
        """
        place = self._places_to_finish.setdefault(lane.name, asyncio.Semaphore(1))
        ended = asyncio.Event()
        async with place:
            if what is not None:
                self._finishing[what] = ended
            try:
                yield Finish(self._thread("finish", lane))
            finally:
                ended.set()
                if self._finishing.get(what) is ended:
                    del self._finishing[what]

    async def others_finish(self, what: Hashable) -> None:
        """Wait until other requests for the same result have been completed, so that it is cached."""
        if what in self._finishing:
            await self._finishing[what].wait()

    def _thread(self, task: str, lane: Lane) -> ThreadPoolExecutor:
        name = f"{task} {lane.name}"
        if name not in self._threads:
            priority = give_requests_priority if lane.device.type == "cpu" else None
            self._threads[name] = ThreadPoolExecutor(1, name, priority)
        return self._threads[name]

    async def compute(self, lane: Lane, work: Work, compute: Callable[[], Result]) -> Result:
        """Run ``compute`` in the lane's own thread, while trainings on its device pause.

        Neither waiting nor computing uses a thread of other requests. A lane always uses the same thread, since each
        computing thread keeps its own buffers, which in a pool of forty threads take a gigabyte.
        """
        thread = self._thread("inference", lane)
        context = contextvars.copy_context()

        def on_lane() -> Result:
            with computing_on(lane):
                return compute()

        with self._pause.asked(str(lane.device) if not work.ahead else ""):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(thread, context.run, on_lane)


class DeviceSlot:
    """The right to compute on a device; if the device fails, on another one.

    Attributes:
        finished: whether the work was completed.
        ahead: the input that was read while the device was awaited; None if nothing was read.
    """

    def __init__(self, queue: InferenceQueue, work: Work) -> None:
        self._queue, self._work = queue, work
        self._lane: Lane | None = None
        self.finished = False
        self.ahead: Any = None

    async def wait(self, granted: Future[Lane]) -> None:
        """Wait for the lane."""
        self._lane = await asyncio.wrap_future(granted)

    async def run(self, compute: Callable[[], Result]) -> Result:
        """Run ``compute`` in the device's own thread; repeat it on another device if this one fails.

        Raises:
            DeviceError: if no suitable device works.
        """
        await self._queue.others_finish(self._work.what)
        while True:
            assert self._lane is not None
            try:
                result = await self._queue.compute(self._lane, self._work, compute)
                self.finished, self.ahead = True, None  # releases the image
                return result
            except Exception as error:
                elsewhere = self._queue.lanes.retry_elsewhere(self._work, error)
                if elsewhere is None:
                    raise
            await self.wait(elsewhere)

    def finishing(self) -> AbstractAsyncContextManager[Finish]:
        """Wait for a place to complete the result off the device: see :meth:`InferenceQueue.finishing`."""
        assert self._lane is not None
        return self._queue.finishing(self._lane, self._work.what)


class Finish:
    """Runs the rest of a work item in its own thread."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._thread = thread

    async def run(self, rest: Callable[[], Result]) -> Result:
        """Run it; its errors are raised here."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, contextvars.copy_context().run, rest)
