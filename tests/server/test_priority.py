"""Requests go before inferences, and threads let each other go on soon."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time

import anyio
import anyio.to_thread
import pytest

from lib.infers.devices.lanes import Lanes
from lib.server.priority import (
    LEAST_PRIORITY,
    NICER_THAN_REQUESTS,
    THREADS_FOR_FILES,
    THREADS_FOR_PACS,
    give_requests_priority,
    limit_threads,
    switching_often,
)
from lib.server.work.queue import InferenceQueue

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")


def own_priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@needs_linux
def test_inference_on_the_cpu_has_less_priority_than_requests() -> None:
    async def main() -> tuple[int, int, int]:
        async with InferenceQueue(1, Lanes.of("cpu")).slot() as slot:
            inferring = await slot.run(own_priority)
        return inferring, own_priority(), await asyncio.to_thread(own_priority)

    inferring, loop, request = asyncio.run(main())
    assert request == loop
    assert inferring == min(LEAST_PRIORITY, loop + NICER_THAN_REQUESTS)


@needs_linux
def test_threads_that_an_inference_starts_have_its_priority() -> None:
    seen: list[int] = []

    def infer() -> None:
        give_requests_priority()
        inner = threading.Thread(target=lambda: seen.append(own_priority()))
        inner.start()
        inner.join()
        seen.append(own_priority())

    outer = threading.Thread(target=infer)
    outer.start()
    outer.join()
    assert seen == [min(LEAST_PRIORITY, own_priority() + NICER_THAN_REQUESTS)] * 2


def test_switches_are_as_before_afterwards() -> None:
    before = sys.getswitchinterval()
    with pytest.raises(ValueError, match="x"), switching_often(before / 4):
        assert sys.getswitchinterval() == pytest.approx(before / 4)
        raise ValueError("x")
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(("waits_for_pacs", "expected"), [(False, THREADS_FOR_FILES), (True, THREADS_FOR_PACS)])
def test_few_requests_on_files_are_handled_at_once(waits_for_pacs: bool, expected: int) -> None:
    """Those that wait for a PACS may be many more, or one that hangs would hold everybody up."""
    lock, at_work, most = threading.Lock(), 0, 0

    def handle() -> None:
        nonlocal at_work, most
        with lock:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.05)
        with lock:
            at_work -= 1

    async def main() -> None:
        limit_threads(waits_for_pacs)
        async with anyio.create_task_group() as group:
            for _ in range(2 * THREADS_FOR_PACS):
                group.start_soon(anyio.to_thread.run_sync, handle)

    anyio.run(main)
    assert THREADS_FOR_FILES <= most <= expected
    assert waits_for_pacs == (most > THREADS_FOR_FILES)
