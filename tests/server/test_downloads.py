"""Files that are replaced or removed between the request and the answer."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.types import Message

from lib.errors import NotFoundError
from lib.server.downloads import Download, send_file, show_file

OLD = b"the old label" * 100


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "label.nii.gz").write_bytes(OLD)
    return tmp_path / "label.nii.gz"


def sent(answer: Download, method: str = "GET", **headers: str) -> tuple[dict[str, str], bytes]:
    """What a client gets of an answer."""
    messages: list[Message] = []
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": fields, "asgi": {"spec_version": "2.4"}}

    async def receive() -> Message:
        await asyncio.sleep(3600)
        raise AssertionError

    async def send(message: Message) -> None:
        messages.append(message)

    asyncio.run(answer(scope, receive, send))
    told = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return told, b"".join(message["body"] for message in messages[1:])


def _replace(file: Path) -> None:
    (file.parent / "new").write_bytes(b"a new and longer label" * 500)
    os.replace(file.parent / "new", file)


@pytest.mark.parametrize("change", [_replace, Path.unlink])
@pytest.mark.skipif(os.name == "nt", reason="an open file has its name as long as it is open there")
def test_file_that_is_replaced_or_removed_is_sent_as_it_was(file: Path, change: Callable[[Path], None]) -> None:
    """The length of one file before the first bytes of another passed for a whole label."""
    answer = send_file(file)
    change(file)
    headers, body = sent(answer)
    assert body == OLD and headers["content-length"] == str(len(OLD))
    assert headers["content-disposition"] == 'attachment; filename="label.nii.gz"'


def test_part_of_a_file_and_its_header_alone_are_sent(file: Path) -> None:
    headers, body = sent(send_file(file, "application/gzip", "x.nii.gz"), range="bytes=4-6")
    assert (body, headers["content-range"], headers["content-type"]) == (b"old", "bytes 4-6/1300", "application/gzip")
    headers, body = sent(show_file(file, "text/html"), method="HEAD")
    assert (body, headers["content-length"]) == (b"", "1300") and "content-disposition" not in headers


def test_file_that_is_gone_or_none_is_not_found(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("gone", "fifo", "."):
        with pytest.raises(NotFoundError):
            send_file(tmp_path / name)
