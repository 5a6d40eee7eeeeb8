"""Gzip streams are read and written as zlib does, with the package isal and without it."""

from __future__ import annotations

import gzip
import io
import subprocess
import sys

import pytest

from lib.imagefiles.compression import BROKEN_GZIP, open_gzip, pack_gzip

CONTENT = bytes(range(256)) * 4000


def test_packed_content_is_what_gzip_unpacks_and_holds_no_time() -> None:
    packed = pack_gzip(CONTENT)
    assert gzip.decompress(packed) == CONTENT and packed[4:8] == bytes(4)


def test_streams_of_two_members_unpack_whole() -> None:
    assert open_gzip(io.BytesIO(gzip.compress(CONTENT) + pack_gzip(b"end"))).read() == CONTENT + b"end"


@pytest.mark.parametrize("place", [1, -6, -2], ids=["magic number", "checksum", "length"])
def test_damaged_stream_is_refused(place: int) -> None:
    packed = bytearray(gzip.compress(CONTENT))
    packed[place] ^= 1
    with pytest.raises(BROKEN_GZIP):
        open_gzip(io.BytesIO(packed)).read()


def test_damaged_block_is_refused() -> None:
    with pytest.raises(BROKEN_GZIP):
        open_gzip(io.BytesIO(gzip.compress(b"")[:10] + b"\xff" * 40)).read()


def test_cut_off_stream_is_refused() -> None:
    with pytest.raises(BROKEN_GZIP):
        open_gzip(io.BytesIO(gzip.compress(CONTENT)[:-9])).read()


def test_zlib_reads_and_writes_where_isal_is_missing() -> None:
    code = (
        "import sys; sys.modules['isal'] = None\n"
        "import gzip, io\n"
        "from lib.imagefiles.compression import open_gzip, pack_gzip\n"
        "assert type(open_gzip(io.BytesIO())) is gzip.GzipFile\n"
        "assert open_gzip(io.BytesIO(pack_gzip(b'a' * 1000))).read() == b'a' * 1000\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
