"""Gzip streams by ISA-L (https://github.com/intel/isa-l), or by zlib if the package ``isal`` is not installed."""

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
    pass  # zlib has the same result, but is slower
else:
    _library, _bare, _error = igzip, isal_zlib, cast(type[Exception], isal_zlib.error)

# Exceptions of reading a stream that is cut off, damaged or has a wrong checksum.
BROKEN_GZIP = (EOFError, zlib.error, gzip.BadGzipFile, _error)


def open_gzip(file: BinaryIO) -> BinaryIO:
    """A stream of the decompressed data of ``file`` from its position on; at its end, checksums are verified."""
    return cast(BinaryIO, _library.GzipFile(fileobj=file, mode="rb"))


def pack_gzip(content: bytes) -> bytes:
    """Compress data into one gzip member without a timestamp, at level 1.

    Masks consist of runs of zeros, for which higher levels take many times as long to save a few per cent.
    """
    return cast(bytes, _library.compress(content, 1, mtime=0))


def pack_quickly(content: Any) -> bytes:
    """Compress data for storage in memory; accepts anything with a contiguous buffer, without copying it."""
    return cast(bytes, _bare.compress(memoryview(content).cast("B"), 1))


def unpack(packed: bytes) -> bytes:
    """Decompress data of :func:`pack_quickly`."""
    return cast(bytes, _bare.decompress(packed))
