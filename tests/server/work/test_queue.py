from __future__ import annotations

import asyncio
import threading
import time
from contextlib import AsyncExitStack

import pytest
import torch

from lib.infers.devices.lane import Lane
from lib.infers.devices.lanes import Lanes
from lib.infers.interruption import InterruptedWork, _run_check
from lib.server.http.errors import BusyError
from lib.server.http.request_id import begin_request, current_request_id
from lib.server.work.queue import InferenceQueue

CPU = torch.device("cpu")


def _queue(size: int, devices: str = "cpu") -> InferenceQueue:
    return InferenceQueue(size, Lanes.of(devices))


def test_one_runs_at_a_time_in_the_order_of_coming() -> None:
    running, most, order = 0, 0, []

    def work(number: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        order.append(number)
        running -= 1

    async def ask(queue: InferenceQueue, number: int) -> None:
        async with queue.slot(CPU) as slot:
            await slot.run(lambda: work(number))

    async def main() -> None:
        queue = _queue(8)
        await asyncio.gather(*(ask(queue, number) for number in range(8)))
        assert queue.waiting == 0

    asyncio.run(main())
    assert most == 1
    assert order == list(range(8))


def test_full_queue_says_when_to_come_back() -> None:
    async def main() -> None:
        queue = _queue(2)
        release = threading.Event()

        async def ask() -> None:
            async with queue.slot(CPU) as slot:
                await slot.run(release.wait)

        waiting = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert queue.waiting == 2
        with pytest.raises(BusyError, match="3 inferences run or wait on cpu") as refused:
            await ask()
        assert refused.value.retry_after_seconds == 3  # three of a second each, as nothing was measured yet
        release.set()
        await asyncio.gather(*waiting)
        await ask()  # there is room again

    asyncio.run(main())


def test_devices_do_not_wait_for_each_other() -> None:
    lanes = Lanes([Lane(name, torch.device("cpu")) for name in ("cpu", "cpu#2")])

    async def main() -> None:
        queue = InferenceQueue(0, lanes)
        meeting = threading.Barrier(2, timeout=5)

        async def ask() -> None:
            async with queue.slot() as slot:
                await slot.run(meeting.wait)

        await asyncio.gather(ask(), ask())

    asyncio.run(main())


def test_work_runs_in_one_thread_and_knows_its_request() -> None:
    async def ask(queue: InferenceQueue, number: int) -> tuple[str, str]:
        begin_request(f"request-{number}")
        async with queue.slot(CPU) as slot:
            return await slot.run(lambda: (current_request_id(), threading.current_thread().name))

    async def main() -> list[tuple[str, str]]:
        queue = _queue(4)
        return await asyncio.gather(*(asyncio.create_task(ask(queue, number)) for number in range(4)))

    seen = asyncio.run(main())
    assert [request for request, _ in seen] == [f"request-{number}" for number in range(4)]
    assert len({thread for _, thread in seen}) == 1


def test_failure_leaves_the_queue_usable() -> None:
    async def main() -> None:
        queue = _queue(0)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with queue.slot(CPU) as slot:
                    await slot.run(lambda: 1 / 0)

    asyncio.run(main())


def test_ahead_waits_until_nobody_is_there_and_gives_way_to_whoever_comes() -> None:
    async def main() -> None:
        queue, order = _queue(8), []
        release, begun = threading.Event(), threading.Event()

        def ahead() -> None:
            begun.set()
            while True:  # window after window
                time.sleep(0.01)
                _run_check(None, None)

        async def compute_ahead() -> str:
            try:
                async with queue.idle_slot(CPU, "a") as slot:
                    order.append("ahead")
                    await slot.run(ahead)
            except InterruptedWork:
                return "gave way"
            return "done"

        async def ask(name: str, what: object) -> None:
            async with queue.slot(CPU, what) as slot:
                await slot.run(release.wait)
                order.append(name)

        first = asyncio.create_task(ask("first", "b"))
        await asyncio.sleep(0.02)
        waiting = asyncio.create_task(compute_ahead())
        await asyncio.sleep(0.05)
        assert not begun.is_set() and queue.waiting == 0, "it takes nobody's place"
        release.set()
        await first
        await asyncio.to_thread(begun.wait)
        assert not queue.busy
        await ask("second", "c")
        assert await waiting == "gave way"
        assert order == ["first", "ahead", "second"]

    asyncio.run(main())


def test_who_asks_for_what_is_computed_ahead_waits_for_it() -> None:
    async def main() -> None:
        queue, order = _queue(8), []
        begun = threading.Event()

        def ahead() -> None:
            begun.set()
            for _ in range(10):
                time.sleep(0.01)
                _run_check(None, None)
            order.append("ahead")

        async def compute_ahead() -> None:
            async with queue.idle_slot(CPU, "a") as slot:
                await slot.run(ahead)

        task = asyncio.create_task(compute_ahead())
        await asyncio.to_thread(begun.wait)
        async with queue.slot(CPU, "a") as slot:
            await slot.run(lambda: order.append("asked"))
        await task
        assert order == ["ahead", "asked"]

    asyncio.run(main())


def test_queue_says_when_it_gets_busy_and_when_it_is_no_longer() -> None:
    async def main() -> list[bool]:
        said: list[bool] = []
        lanes = Lanes.of("cpu")
        lanes.watch(lambda in_use: said.append("cpu" in in_use))
        queue = InferenceQueue(8, lanes)

        async def ask() -> None:
            async with queue.slot(CPU) as slot:
                await slot.run(lambda: time.sleep(0.01))

        await asyncio.gather(*(ask() for _ in range(3)))
        await ask()
        async with queue.idle_slot(CPU, "a") as slot:
            await slot.run(lambda: None)
        return said

    assert asyncio.run(main()) == [True, False, True, False]


def test_idle_work_of_a_thread_gets_its_result_and_leaves_the_device_free() -> None:
    async def main() -> None:
        queue, loop = _queue(0), asyncio.get_running_loop()

        def ask() -> str:
            return queue.run_when_idle(loop, CPU, "trial", lambda: threading.current_thread().name, 5.0)

        assert (await asyncio.to_thread(ask)).startswith("inference")
        async with queue.slot(CPU) as slot:
            assert await slot.run(lambda: 3) == 3

    asyncio.run(main())


def test_idle_work_of_a_thread_does_not_start_while_one_request_runs() -> None:
    async def main() -> None:
        queue, loop = _queue(0), asyncio.get_running_loop()
        started: list[str] = []

        def ask() -> None:
            queue.run_when_idle(loop, CPU, "trial", lambda: started.append("trial"), 0.01)

        async with queue.slot(CPU):
            assert queue.waiting == 0  # the one that runs does not wait, and counts all the same
            with pytest.raises(InterruptedWork):
                await asyncio.to_thread(ask)
        assert started == []
        await asyncio.to_thread(ask)  # the device is idle again
        assert started == ["trial"]

    asyncio.run(main())


def test_idle_work_of_a_thread_ends_when_a_request_comes() -> None:
    async def main() -> None:
        queue, loop = _queue(0), asyncio.get_running_loop()
        running = asyncio.Event()

        def windows() -> None:
            loop.call_soon_threadsafe(running.set)
            while True:
                _run_check(None, None)  # type: ignore[arg-type]

        trial = asyncio.create_task(asyncio.to_thread(lambda: queue.run_when_idle(loop, CPU, "trial", windows, 5.0)))
        await running.wait()
        async with queue.slot(CPU) as slot:
            assert await slot.run(lambda: 3) == 3
        with pytest.raises(InterruptedWork):
            await trial

    asyncio.run(main())


def test_next_image_is_read_while_one_is_computed_and_no_more_than_that() -> None:
    async def main() -> None:
        queue = _queue(8)
        release, read = threading.Event(), []

        async def ask(number: int) -> object:
            async with queue.slot(CPU, read=lambda: read.append(number) or f"image {number}") as slot:
                return await slot.run(lambda: release.wait(10) and slot.ahead)

        asked = []
        for number in range(4):
            asked.append(asyncio.create_task(ask(number)))
            await asyncio.sleep(0)
        while not read:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert read == [1], "the first had its device at once, and the others' turn to be read comes later"
        release.set()
        assert (await asyncio.gather(*asked))[:2] == [None, "image 1"]
        assert await asyncio.wait_for(ask(9), 5) is None, "nobody has kept a place"

    asyncio.run(main())


def test_request_that_is_given_up_leaves_its_place_to_read() -> None:
    async def main() -> None:
        queue, release, reading = _queue(8), threading.Event(), threading.Event()

        async def ask(read: object = None) -> object:
            async with queue.slot(CPU, read=read) as slot:  # type: ignore[arg-type]
                return await slot.run(lambda: release.wait(10) and slot.ahead)

        first = asyncio.create_task(ask())
        await asyncio.sleep(0.02)
        leaving = asyncio.create_task(ask(lambda: reading.set() or "nobody wants it"))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        reading.clear()
        third = asyncio.create_task(ask(lambda: reading.set() or "read"))
        while not reading.is_set():
            await asyncio.sleep(0.01)
        release.set()
        await first
        assert await third == "read"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("second", "meanwhile"),
    [("another", ["first computed", "second computed"]), ("the same", ["first computed"])],
)
def test_device_is_free_while_a_request_is_finished_and_only_the_same_waits_for_its_end(
    second: str, meanwhile: list[str]
) -> None:
    async def main() -> list[str]:
        queue, order = _queue(8), []
        finish, finishing = threading.Event(), threading.Event()

        async def ask(name: str, what: str) -> None:
            async with AsyncExitStack() as stack:
                async with queue.slot(CPU, what) as slot:
                    await slot.run(lambda: order.append(f"{name} computed"))
                    place = await stack.enter_async_context(slot.finishing())
                await place.run(lambda: rest(name))

        def rest(name: str) -> None:
            if name == "first":
                finishing.set()
                assert finish.wait(10)
            order.append(f"{name} finished")

        first = asyncio.create_task(ask("first", "the same"))
        while not finishing.is_set():
            await asyncio.sleep(0.01)
        other = asyncio.create_task(ask("second", second))
        await asyncio.sleep(0.2)
        assert order == meanwhile
        finish.set()
        await asyncio.gather(first, other)
        return order

    order = asyncio.run(main())
    rest = [step for step in ("first finished", "second computed", "second finished") if step not in meanwhile]
    assert order == [*meanwhile, *rest]
