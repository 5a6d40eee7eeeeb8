"""Atomic and durable file writes: temporary file, fsync, rename.

A new name is durable only after its folder has been synced too: https://man7.org/linux/man-pages/man2/fsync.2.html
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
# A partial file of an unknown process is removed only after a while, since the process may run in another container.
SECONDS_BEFORE_LEFT_OVER = 60.0
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


@dataclass(frozen=True)
class Staged:
    """A complete and durable file with a temporary name, which has to be renamed.

    Attributes:
        path: its path.
        size: size in bytes.
        sha256: SHA-256 of its content, in hexadecimal.
    """

    path: Path
    size: int
    sha256: str


def open_at_once(path: Path) -> BinaryIO:
    """Open a file for reading without waiting: opening a FIFO without a writer would block for ever.

    The caller checks the kind of the opened file.

    Raises:
        OSError: if it cannot be opened, or is a folder.
    """
    opened = os.open(path, _FLAGS)
    try:
        return os.fdopen(opened, "rb")
    except OSError:  # a folder
        os.close(opened)
        raise


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file, in blocks of a mebibyte."""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def stage(blocks: Iterable[bytes], folder: Path, durable: bool = True) -> Staged:
    """Write a new file into ``folder`` with a temporary name that identifies the writing process.

    Args:
        blocks: the content.
        folder: folder of its final name.
        durable: whether to sync it to disk; False for content that can be made again after a power failure.

    Raises:
        OSError: if it cannot be written; no part of it is left then.
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
    """Write a temporary file next to ``path``, which replaces ``path`` atomically at the end of the block.

    Args:
        path: the final path.
        durable: whether to sync it to disk before it is renamed.
        mode: permissions, which are set before anything is written; by default those of new files of the process.

    Raises:
        Any exception of the block; the previous file is then unchanged, and nothing is left of the new one.
    """
    # includes the thread's id, since two threads may write a file of the same name at the same time
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
    """Write or replace a file atomically and durably.

    Raises:
        OSError: if it cannot be written; the previous file is then unchanged.
    """
    staged = stage((content,), path.parent)
    try:
        os.replace(staged.path, path)
    except OSError:
        staged.path.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if the operating system supports this."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_everything(folder: Path) -> None:
    """Sync everything that was written below a folder, when there are too many files to sync one by one."""
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
    """SHA-256 of blocks of data, in hexadecimal."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _age_seconds(path: Path) -> float:
    """Time since a file was written; 0 if it has been renamed meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def remove_left_over(folder: Path) -> list[Path]:
    """Remove the partial files of processes that no longer run."""
    removed = []
    for path in folder.glob(f".*-*{PARTIAL}"):
        writer = path.name[1:].partition("-")[0]
        alive = writer.isdigit() and int(writer) != os.getpid() and psutil.pid_exists(int(writer))
        if not alive and _age_seconds(path) > SECONDS_BEFORE_LEFT_OVER:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
