from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lib.errors import ParameterError
from lib.server.http.parameters import parse_aside, parse_object


def test_object_is_parsed_and_nothing_is_an_empty_one() -> None:
    assert parse_object('{"a": [1, 2.5, null, true, "\\u00e4"]}') == {"a": [1, 2.5, None, True, "ä"]}
    assert parse_object("") == parse_object("  ") == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "a JSON object"),
        ("[]", "a JSON object"),
        ("null", "a JSON object"),
        ("3", "a JSON object"),
        ('{"a": NaN}', "NaN is no JSON"),
        ('{"a": -Infinity}', "-Infinity is no JSON"),
        ('{"a": [1e999]}', "finite numbers"),
        ('{"a": "\\ud800"}', "Unicode text"),
        ('{"\\ud800": 1}', "Unicode text"),
        ('{"a":' * 25 + "1" + "}" * 25, "at most 20 levels"),
        ('{"a":' * 100_000, "a JSON object"),
        ('{"a": ' + "9" * 5000 + "}", "a JSON object"),
    ],
)
def test_anything_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason) as refused:
        parse_object(text)
    assert len(str(refused.value)) < 600


@pytest.mark.timeout(60)
def test_key_that_stands_twice_among_many_is_found() -> None:
    """It was counted anew for each key, and a body of a megabyte held up every other client for minutes."""
    text = "{" + ",".join(f'"{number:x}":1' for number in range(100_000)) + ',"1869f":2}'
    with pytest.raises(ParameterError, match="the key '1869f' stands twice"):
        parse_object(text)


def test_long_text_is_parsed_beside_the_event_loop() -> None:
    """Lists of a megabyte took most of a second, in which nobody else was answered."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def parse() -> dict[str, Any]:
        beside = asyncio.create_task(others())
        await asyncio.sleep(0)
        try:
            return await parse_aside('{"a": [' + "[]," * 300_000 + "1]}")
        finally:
            beside.cancel()

    assert len(asyncio.run(parse())["a"]) == 300_001
    assert turns > 10
    with pytest.raises(ParameterError, match="a JSON object"):
        asyncio.run(parse_aside("[" * 100_000))
