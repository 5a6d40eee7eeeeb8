"""Few read at the same time, and more are at work."""

from __future__ import annotations

import threading

import anyio

from lib.server.readers import Readers


def test_few_read_at_once_while_more_are_at_work() -> None:
    readers = Readers(at_once=2, threads=4)
    lock, all_at_work = threading.Lock(), threading.Barrier(4, timeout=60)
    reading, most = 0, 0

    def work() -> None:
        nonlocal reading, most
        with readers.reading:
            with lock:
                reading += 1
                most = max(most, reading)
            with lock:
                reading -= 1
        all_at_work.wait()

    async def send() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(8):
                group.start_soon(readers.beside, work)

    anyio.run(send)
    assert 1 <= most <= 2


def test_what_reads_throughout_waits_for_a_place() -> None:
    readers = Readers(at_once=1)
    began = threading.Event()

    async def send() -> None:
        async with anyio.create_task_group() as group:
            with readers.reading:
                group.start_soon(readers.read, began.set)
                await anyio.sleep(0.1)
                assert not began.is_set()

    anyio.run(send)
    assert began.is_set()
