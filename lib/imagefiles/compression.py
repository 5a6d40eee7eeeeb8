"""Gzip streams by ISA-L (https://github.com/intel/isa-l), or by zlib where the package ``isal`` is missing."""

from __future__ import annotations

import gzip
import zlib
from typing import Any, BinaryIO, cast

_library: Any = gzip
_bare: Any = zlib
_error: type[Exception] = zlib.error
try:
    from isal import igzip, isal_zlib
except ImportError:
    pass  # zlib reads and writes the same, in more time
else:
    _library, _bare, _error = igzip, isal_zlib, cast(type[Exception], isal_zlib.error)

# What reading a stream that is cut off, damaged or has a wrong checksum ends in.
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile, _error)


def open_gzip(file: BinaryIO) -> BinaryIO:
    """What ``file`` unpacks to from where it stands; its end compares checksums, and raises of :data:`BROKEN_GZIP`."""
    return cast(BinaryIO, _library.GzipFile(fileobj=file, mode="rb"))


def pack_gzip(content: bytes) -> bytes:
    """One gzip member without a time, at level 1.

    Masks are runs of zeros, and higher levels take many times as long for a few per cent.
    """
    return cast(bytes, _library.compress(content, 1, mtime=0))


def pack_quickly(content: Any) -> bytes:
    """What memory holds, packed for memory: anything with a contiguous buffer, whose copy nobody needs."""
    return cast(bytes, _bare.compress(memoryview(content).cast("B"), 1))


def unpack(packed: bytes) -> bytes:
    """What :func:`pack_quickly` packed."""
    return cast(bytes, _bare.decompress(packed))
