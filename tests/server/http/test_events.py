"""What has changed, told to those who listen."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from lib.server.http.events import TOPICS, Changes, closed_by_signals
from lib.server.pages.page_routes import SECTIONS

SECONDS_BETWEEN = 0.02


def test_topics_are_told_once_and_in_order_from_any_thread() -> None:
    async def play() -> list[list[str]]:
        changes, heard = Changes(SECONDS_BETWEEN), []

        async def listen() -> None:
            async for topics in changes.listen():
                heard.append(topics)
                if len(heard) == 2:
                    return

        task = asyncio.create_task(listen())
        await asyncio.sleep(0)
        for thread in [threading.Thread(target=changes.mark, args=(topic,)) for topic in ("job", "pool", "job")]:
            thread.start()
            thread.join()
        while not heard:
            await asyncio.sleep(0.01)
        changes.mark("models")
        await asyncio.wait_for(task, 5)
        return heard

    assert asyncio.run(play()) == [["pool", "job"], ["models"]]


def test_closing_ends_those_who_listen() -> None:
    async def play() -> list[list[str]]:
        changes = Changes(SECONDS_BETWEEN)

        async def listen() -> list[list[str]]:
            return [topics async for topics in changes.listen()]

        task = asyncio.create_task(listen())
        await asyncio.sleep(0)
        changes.close()
        return await asyncio.wait_for(task, 5)

    assert asyncio.run(play()) == []


def test_unknown_topic_is_refused() -> None:
    with pytest.raises(ValueError, match=r"topics \['weather'\] are unknown"):
        Changes(SECONDS_BETWEEN).mark("weather")


def test_stop_signal_closes_and_is_passed_on() -> None:
    passed: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: passed.append(number))
    try:
        changes = Changes(SECONDS_BETWEEN)
        with closed_by_signals(changes):
            signal.raise_signal(signal.SIGTERM)
        assert passed == [signal.SIGTERM]

        async def listen() -> list[list[str]]:
            return [topics async for topics in changes.listen()]

        assert asyncio.run(listen()) == []
        signal.raise_signal(signal.SIGTERM)
        assert passed == [signal.SIGTERM] * 2, "the handler of before is back"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_page_has_a_part_for_each_topic() -> None:
    assert set(SECTIONS) == set(TOPICS)
