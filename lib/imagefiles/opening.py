"""Opens files that other users write and may be changing: only regular files, only complete ones, and without
blocking.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from lib.errors import ImageError
from lib.storage.files import open_at_once


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; links are followed.

    Raises:
        ImageError: if it is missing, not a regular file (a FIFO, a device, a folder) or empty, cannot be opened, or
            changed while it was read.
    """
    check_regular(path)
    try:
        file = open_at_once(path)
    except OSError as error:
        raise ImageError(f"image {path.name!r} cannot be opened: {error.strerror}") from error
    with file:
        before = os.fstat(file.fileno())
        _check_status(before, path)
        try:
            yield file
        finally:
            after = os.fstat(file.fileno())
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise ImageError(f"image {path.name!r} changed while it was read; ask again once it is complete")


def check_regular(path: Path) -> None:
    """Refuse anything but a regular file, without opening it.

    Raises:
        ImageError: stating the problem.
    """
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ImageError(f"image {path.name!r} does not exist") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"image {path.name!r} cannot be read: {error}") from error
    _check_status(status, path)


def _check_status(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"image {path.name!r} is no regular file, but a {_kind(status.st_mode)}; valid: a file")
    if status.st_size == 0:
        raise ImageError(f"image {path.name!r} is an empty file")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
