"""Reads the bytes of the voxels: exactly as many as the header states, with verified checksums."""

from __future__ import annotations

import bz2
from collections.abc import Iterator
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from lib.errors import ImageError
from lib.imagefiles.compression import BROKEN_GZIP, open_gzip

BLOCK_BYTES = 2**20
# Bytes that may follow the voxels; more of them do not result from an inaccurate header.
MOST_BYTES_AFTER = 2**20
# No DEFLATE stream expands to more than 1032 times its size (https://zlib.net/zlib_tech.html).
MOST_GZIP_RATIO = 1040
BROKEN_STREAM = BROKEN_GZIP

Bytes = npt.NDArray[np.uint8]


def open_stream(file: BinaryIO, encoding: str) -> BinaryIO:
    """A stream of the decompressed bytes from ``file``'s position on; checksums are verified at its end.

    Args:
        file: file open for reading.
        encoding: encoding of the bytes: ``raw``, ``gzip`` or ``bzip2``.
    """
    if encoding == "gzip":
        return open_gzip(file)
    return cast(BinaryIO, bz2.BZ2File(file)) if encoding == "bzip2" else file


def check_promise(size: int, packed: int, encoding: str, name: str) -> None:
    """Refuse a header that announces more bytes than its file can contain, before anything is decompressed.

    Args:
        size: bytes of the voxels as stated in the header.
        packed: remaining bytes of the file.
        encoding: see :func:`open_stream`.
        name: name of the file.

    Raises:
        ImageError: naming both sizes.
    """
    most = {"raw": packed, "gzip": packed * MOST_GZIP_RATIO}.get(encoding)
    if most is not None and size > most:
        raise ImageError(
            f"image {name!r} is damaged: its header promises {size} bytes of voxels, and it holds "
            f"{'' if encoding == 'raw' else 'at most '}{most}"
        )


def read_exactly(stream: BinaryIO, size: int, name: str) -> Bytes:
    """The next ``size`` bytes; memory is allocated only as they arrive.

    Raises:
        ImageError: if there are fewer.
    """
    return next(read_blocks(stream, size, max(1, size), name), np.empty(0, dtype=np.uint8))


def read_blocks(stream: BinaryIO, size: int, at_once: int, name: str) -> Iterator[Bytes]:
    """The next ``size`` bytes in blocks of ``at_once``, of which the last may be smaller.

    Raises:
        ImageError: if there are fewer.
    """
    for first in range(0, size, at_once):
        block: Bytes = np.empty(min(at_once, size - first), dtype=np.uint8)
        done = 0
        while done < len(block):
            arrived = stream.read(min(BLOCK_BYTES, len(block) - done))
            if not arrived:
                raise ImageError(f"image {name!r} is damaged: it ends after {first + done} of {size} bytes of voxels")
            block[done : done + len(arrived)] = np.frombuffer(arrived, dtype=np.uint8)
            done += len(arrived)
        yield block


def check_end(stream: BinaryIO, name: str) -> None:
    """Read a compressed stream to its end, where its checksum is verified.

    Raises:
        ImageError: if there is more data than expected.
        BROKEN_STREAM: if it was cut off, or if its checksum is wrong.
    """
    more = 0
    while block := stream.read(BLOCK_BYTES):
        more += len(block)
        if more > MOST_BYTES_AFTER:
            raise ImageError(f"image {name!r} is damaged: it holds more than its header says")
