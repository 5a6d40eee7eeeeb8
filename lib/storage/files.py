"""Files that are whole or not there at all, whatever ends the process: temporary file, fsync, rename.

https://man7.org/linux/man-pages/man2/fsync.2.html: a new name is only durable once its folder has been synced too.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

BLOCK_BYTES = 2**20
PARTIAL = ".part"
# A partial file of a process that is gone is only removed after a while: in another container, it may not be gone.
SECONDS_BEFORE_LEFT_OVER = 60.0


@dataclass(frozen=True)
class Staged:
    """A complete and durable file under a temporary name, to be renamed.

    Attributes:
        path: where it is.
        size: in bytes.
        sha256: of its content, in hexadecimal.
    """

    path: Path
    size: int
    sha256: str


def read_blocks(path: Path) -> Iterator[bytes]:
    """A file's content, a mebibyte at a time."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def stage(blocks: Iterable[bytes], folder: Path, durable: bool = True) -> Staged:
    """Write a new file into ``folder``, under a temporary name that says which process writes it.

    Args:
        blocks: the content.
        folder: where it will have its name.
        durable: wait for the disk; False for what can be made again from elsewhere after a power cut.

    Raises:
        OSError: when it cannot be written; then nothing is left of it.
    """
    path = folder / f".{os.getpid()}-{uuid.uuid4().hex}{PARTIAL}"
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("xb") as file:
            for block in blocks:
                file.write(block)
                digest.update(block)
                size += len(block)
            file.flush()
            if durable:
                os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Staged(path, size, digest.hexdigest())


@contextmanager
def replacing(path: Path, durable: bool = False, mode: int | None = None) -> Iterator[BinaryIO]:
    """Write a file under a temporary name beside ``path``, which it replaces at the end of the block in one step.

    Args:
        path: its name.
        durable: wait for the disk before it gets its name.
        mode: its permissions, from before anything is written into it; as the process makes files where not given.

    Raises:
        Whatever the block raises; then the file is as it was before, and nothing is left of the new one.
    """
    # the thread's number too: two threads may write a file of the same name at the same time
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        if mode is not None:
            temporary.touch(mode=mode)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """Write or replace a file in one step.

    Raises:
        OSError: when it cannot be written; then the file is as it was before.
    """
    staged = stage((content,), path.parent)
    try:
        os.replace(staged.path, path)
    except OSError:
        staged.path.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the operating system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_everything(folder: Path) -> None:
    """Make all that was written below a folder durable, for when there is too much to do it file by file."""
    if hasattr(os, "sync"):
        os.sync()
        return
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return sha256_of_blocks(read_blocks(path))


def sha256_of_blocks(blocks: Iterable[bytes]) -> str:
    """SHA-256 of what comes in blocks, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _age_seconds(path: Path) -> float:
    """Time since a file was written; 0 where it has got its name meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def remove_left_over(folder: Path) -> list[Path]:
    """Remove the partial files of processes that are gone."""
    removed = []
    for path in folder.glob(f".*-*{PARTIAL}"):
        writer = path.name[1:].partition("-")[0]
        alive = writer.isdigit() and int(writer) != os.getpid() and psutil.pid_exists(int(writer))
        if not alive and _age_seconds(path) > SECONDS_BEFORE_LEFT_OVER:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
