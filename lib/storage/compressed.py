"""gzip files whose checksum is looked at: readers that stop at the last byte that they need never see it."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from lib.storage.files import BLOCK_BYTES

DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)
"""What reading a gzip file raises whose content is not what was packed."""


def unpacked_size(path: Path, most_bytes: int) -> int:
    """Unpack a gzip file to its end, where its checksum and size are, and keep nothing of it.

    Args:
        path: the file.
        most_bytes: stop once there are more than these.

    Returns:
        How many bytes it holds; a number above ``most_bytes`` where there are more.

    Raises:
        gzip.BadGzipFile, EOFError, zlib.error: when the content does not fit its checksum, or is cut off.
    """
    size = 0
    with gzip.open(path) as file:
        while size <= most_bytes and (block := file.read(BLOCK_BYTES)):
            size += len(block)
    return size
