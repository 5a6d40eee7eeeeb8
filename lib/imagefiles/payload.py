"""The voxels' bytes of a file: as many as its header says, of a stream whose checksum is right."""

from __future__ import annotations

import bz2
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from lib.errors import ImageError
from lib.imagefiles.compression import BROKEN_GZIP, open_gzip

BLOCK_BYTES = 2**20
# What may follow the voxels; more of it is no header's mistake.
MOST_BYTES_AFTER = 2**20
# No DEFLATE stream unpacks to more than 1032 times its size (https://zlib.net/zlib_tech.html).
MOST_GZIP_RATIO = 1040
BROKEN_STREAM = BROKEN_GZIP

Bytes = npt.NDArray[np.uint8]


def open_stream(file: BinaryIO, encoding: str) -> BinaryIO:
    """A stream of the decompressed bytes from ``file``'s position on; checksums are verified at its end.

    Args:
        file: open for reading.
        encoding: of the bytes: ``raw``, ``gzip`` or ``bzip2``.
    """
    if encoding == "gzip":
        return open_gzip(file)
    return cast(BinaryIO, bz2.BZ2File(file)) if encoding == "bzip2" else file


def check_promise(size: int, packed: int, encoding: str, name: str) -> None:
    """Refuse a header that promises more than its file can hold, before anything is unpacked.

    Args:
        size: bytes of the voxels, as the header says.
        packed: bytes that are left of the file.
        encoding: as for :func:`open_stream`.
        name: the file's.

    Raises:
        ImageError: naming both.
    """
    most = {"raw": packed, "gzip": packed * MOST_GZIP_RATIO}.get(encoding)
    if most is not None and size > most:
        raise ImageError(
            f"image {name!r} is damaged: its header promises {size} bytes of voxels, and it holds "
            f"{'' if encoding == 'raw' else 'at most '}{most}"
        )


def read_exactly(stream: BinaryIO, size: int, name: str) -> Bytes:
    """The next ``size`` bytes; memory is only taken as they come.

    Raises:
        ImageError: when there are fewer.
    """
    content: Bytes = np.empty(size, dtype=np.uint8)
    done = 0
    while done < size:
        block = stream.read(min(BLOCK_BYTES, size - done))
        if not block:
            raise ImageError(f"image {name!r} is damaged: it ends after {done} of {size} bytes of voxels")
        content[done : done + len(block)] = np.frombuffer(block, dtype=np.uint8)
        done += len(block)
    return content


def check_end(stream: BinaryIO, name: str) -> None:
    """Read a packed stream to its end, which is where its checksum is compared.

    Raises:
        ImageError: when there is more than there should be.
        BROKEN_STREAM: when it was cut off or its checksum is wrong.
    """
    more = 0
    while block := stream.read(BLOCK_BYTES):
        more += len(block)
        if more > MOST_BYTES_AFTER:
            raise ImageError(f"image {name!r} is damaged: it holds more than its header says")
