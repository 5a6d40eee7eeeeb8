"""Files as answers: opened once, so that what is sent is one file from its first byte to its last."""

from __future__ import annotations

import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, BinaryIO

import anyio
from fastapi.responses import FileResponse
from monailabel.utils.others.generic import get_mime_type
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from lib.errors import ConflictError, NotFoundError
from lib.server.http.uploads import MIB
from lib.storage.files import open_at_once


def send_file(path: Path, media_type: str = "", name: str = "") -> FileResponse:
    """A file as a download.

    Args:
        path: where it lies.
        media_type: of its content; by its name where not given.
        name: under which it is saved; its own where not given.

    Raises:
        NotFoundError: when it is gone, or no regular file.
    """
    return Download(path, media_type=media_type or get_mime_type(str(path)), filename=name or path.name)


def show_file(path: Path, media_type: str) -> FileResponse:
    """A file that a browser shows.

    Raises:
        NotFoundError: as :func:`send_file`.
    """
    return Download(path, media_type=media_type)


class Download(FileResponse):
    """A file in few pieces: each is read by a thread, whose turn a busy server's answer waits for.

    It is open from the beginning: one that is replaced or removed meanwhile is sent as it was, and never the size of
    one and the bytes of the other. Of a file that grows while it is sent, as many bytes are sent as were
    announced. Of one that shrinks the answer breaks off, so that no client takes it for whole.

    Raises:
        NotFoundError: when it is gone, or no regular file.
    """

    chunk_size = 8 * MIB

    def __init__(self, path: Path, **options: Any) -> None:
        self._file = _open(path)
        super().__init__(path, stat_result=os.fstat(self._file.fileno()), **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await self._send(scope, receive, send)
        finally:
            self._file.close()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET" and "range" not in Headers(scope=scope):
            announced = int(self.headers["content-length"])
            if announced <= self.chunk_size:
                await self._send_at_once(announced, send)
                return
        left = 0
        head = scope["method"] == "HEAD"

        async def sending(message: Message) -> None:
            nonlocal left
            if message["type"] == "http.response.start":
                left = 0 if head else int(Headers(raw=message["headers"])["content-length"])
            else:
                body = message.get("body", b"")[:left]
                left -= len(body)
                if left and not message.get("more_body", False):
                    raise ConflictError(f"{Path(self.path).name} was changed while it was sent")
                message = {**message, "body": body}
            await send(message)

        await super().__call__(scope, receive, sending)

    async def _send_at_once(self, announced: int, send: Send) -> None:
        """Send a small file, which takes one turn of a thread in place of three.

        Raises:
            ConflictError: if it has shrunk meanwhile; nothing has been sent then.
        """
        content = await anyio.to_thread.run_sync(self._file.read, announced)
        if len(content) < announced:
            raise ConflictError(f"{Path(self.path).name} was changed while it was sent")
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": content})

    @asynccontextmanager
    async def _open_file(self) -> AsyncIterator[anyio.AsyncFile[bytes]]:
        """In the place of Starlette's, which would open what has the name by now."""
        yield anyio.wrap_file(self._file)


def _open(path: Path) -> BinaryIO:
    try:
        opened = open_at_once(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError("file", path.name) from error
    except IsADirectoryError as error:
        raise NotFoundError("regular file", path.name) from error
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise NotFoundError("regular file", path.name)
    return opened
