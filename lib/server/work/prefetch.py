"""Prefetching of masks: for the case that was handed out and the likely next ones, while the device is idle."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from lib.errors import UnetrError
from lib.infers.interruption import InterruptedWork
from lib.infers.request import InferRequest
from lib.infers.task import ReadImage, UnetrInferTask
from lib.server.background import in_background
from lib.server.http.metrics import Metrics
from lib.server.work.queue import InferenceQueue

logger = logging.getLogger("unetr.server")

MOST_WANTED = 16
MOST_AT_ONCE = 4
TRIES = 3
"""Number of starts of one prefetch, since a server that is never idle finishes none."""


@dataclass(frozen=True)
class PrefetchKey:
    """A mask that is likely to be requested: of an image by its id, by a model."""

    model: str
    image: str


class Prefetcher:
    """Computes masks in advance into the result cache, one at a time on each device.

    Args:
        task_of: returns the inference task of a model.
        file_of: returns the file of an image.
        inferences: the queue, whose idle slots it uses.
        metrics: metrics that count prefetches.
        enabled: whether anything is prefetched.
    """

    def __init__(
        self,
        task_of: Callable[[str], UnetrInferTask],
        file_of: Callable[[str], Path],
        inferences: InferenceQueue,
        metrics: Metrics,
        enabled: bool,
    ) -> None:
        self._task_of, self._file_of, self._inferences, self._metrics = task_of, file_of, inferences, metrics
        self._enabled = enabled
        self._wanted: OrderedDict[PrefetchKey, int] = OrderedDict()
        self._begun: set[PrefetchKey] = set()
        self._more = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Prefetch masks in the background until the block ends."""
        self._loop = asyncio.get_running_loop()
        # one more than there are devices, which reads the next image while they compute
        count = 1 + min(MOST_AT_ONCE, sum(lane.pooled for lane in self._inferences.lanes))
        async with in_background("prefetch", *(self._work() for _ in range(count))):
            yield

    def want(self, wanted: Sequence[PrefetchKey]) -> None:
        """Prefetch these next, in this order; may be called from any thread."""
        if self._enabled and self._loop is not None:
            self._loop.call_soon_threadsafe(self._add, list(wanted))

    @property
    def waiting(self) -> int:
        """Number of masks that are queued and not computed yet."""
        return len(self._wanted)

    def _add(self, wanted: Sequence[PrefetchKey]) -> None:
        for one in reversed(wanted):
            self._wanted[one] = 0
            self._wanted.move_to_end(one, last=False)
        while len(self._wanted) > MOST_WANTED:
            self._wanted.popitem()
        self._more.set()

    async def _work(self) -> None:
        while True:
            await self._more.wait()
            one = next((wanted for wanted in self._wanted if wanted not in self._begun), None)
            if one is None:
                self._more.clear()
                continue
            tries = self._wanted[one]
            self._begun.add(one)
            outcome = await self._try(one)
            self._begun.discard(one)
            if outcome == "interrupted" and tries + 1 < TRIES:
                if one in self._wanted:
                    self._wanted[one] = tries + 1
                self._more.set()
                continue
            self._wanted.pop(one, None)
            self._metrics.count_prefetch(one.model, outcome)

    async def _try(self, one: PrefetchKey) -> str:
        """Prefetch a mask; returns ``done``, ``known``, ``interrupted`` or ``failed``."""
        try:
            task = self._task_of(one.model)
            # downloaded and read before it takes a slot, so that neither a device nor a request waits for a PACS or a
            # disk
            image = await anyio.to_thread.run_sync(self._file_of, one.image)
            request = task.parse({"image": str(image)})
            read = await anyio.to_thread.run_sync(task.read_ahead, request)
            needs = await anyio.to_thread.run_sync(self._inferences.forecast, task, request)
            async with self._inferences.idle_slot(None, one, needs) as slot:
                return await slot.run(lambda: _compute(task, request, read))
        except InterruptedWork:
            return "interrupted"
        except UnetrError as error:
            logger.info("%s is not segmented ahead: %s", one.image, error)
            return "failed"
        except Exception:
            logger.exception("%s could not be segmented ahead", one.image)
            return "failed"


def _compute(task: UnetrInferTask, request: InferRequest, read: ReadImage | None) -> str:
    if task.is_kept(request):
        return "known"
    task.mask_of(request, read)
    return "done"
