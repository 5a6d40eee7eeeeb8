"""Limits the size of folders that grow by themselves, and checks whether a disk has space."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.storage.full_disk import storage_problem

MIB = 2**20


def make_room(groups: Sequence[Sequence[Path]], limit_bytes: int) -> list[Path]:
    """Remove files, first ones first, until the rest fits.

    Args:
        groups: files that belong together, such as a mask and its side-car; oldest first.
        limit_bytes: size limit of all of them.

    Returns:
        The removed files. Files that do not exist have no size.
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
    """Whether a file of this size fits into a folder now, which a test file shows, since quotas are not reported.

    Raises:
        OSError: if the folder does not exist, or if the disk fails in another way.
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
