"""A disk of its own for a test: one that can really be full, or really take nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 2**20


class SmallDisk:
    """A file system in memory.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Leave not a byte."""
        with self._filler.open("ab", buffering=0) as file:
            for size in (MIB, 4096, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def make_room(self) -> None:
        """Take away what :meth:`fill` has written."""
        self._filler.unlink()

    def set_read_only(self, read_only: bool) -> None:
        """Have it take nothing, or again what there is room for; no file on it may be open for writing."""
        _as_root("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(self.folder)).check_returncode()


@contextmanager
def mounted(folder: Path, size_mib: int) -> Iterator[SmallDisk]:
    """A disk of that size at ``folder``; skips the test where the system does not let it be mounted."""
    folder.mkdir()
    options = f"size={size_mib}m,uid={os.getuid()},mode=755" if sys.platform == "linux" else ""
    if not options or _as_root("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)).returncode:
        pytest.skip("needs the right to mount a tmpfs: root on Linux, or sudo without a password")
    try:
        yield SmallDisk(folder)
    finally:
        _as_root("umount", "--lazy", str(folder)).check_returncode()


def _as_root(*command: str) -> subprocess.CompletedProcess[bytes]:
    words = command if os.getuid() == 0 else ("sudo", "-n", *command)
    try:
        return subprocess.run(words, capture_output=True)
    except FileNotFoundError:
        return subprocess.CompletedProcess(words, 127)
