"""Folders that grow by themselves are kept within a size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
