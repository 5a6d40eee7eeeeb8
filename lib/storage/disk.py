"""Folders that grow by themselves are kept within a size, and whether a disk has room."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.storage.full_disk import storage_problem

MIB = 2**20


def make_room(groups: Sequence[Sequence[Path]], limit_bytes: int) -> list[Path]:
    """Remove files, the first ones first, until what is left fits.

    Args:
        groups: files that go together, such as a mask and its side-car; the oldest first.
        limit_bytes: most bytes of all of them.

    Returns:
        What was removed. Files that are gone already count nothing.
    """
    sizes = [sum(path.stat().st_size for path in group if path.is_file()) for group in groups]
    total, removed = sum(sizes), []
    for group, size in zip(groups, sizes, strict=True):
        if total <= limit_bytes:
            break
        total -= size
        for path in group:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def has_room(folder: Path, size_bytes: int) -> bool:
    """Whether a folder takes a file of that size now: tried with one, since quotas are not in what a disk tells.

    Raises:
        OSError: when the folder is not there, or the disk fails in another way.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size_bytes)
                return True
        return shutil.disk_usage(folder).free > size_bytes
    except OSError as error:
        if not storage_problem(error):
            raise
        return False
