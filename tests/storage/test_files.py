"""Files that are replaced as a whole, and their checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lib.storage.files import replacing, sha256_of, sha256_of_blocks


@pytest.mark.parametrize("durable", [False, True])
def test_file_is_replaced_at_the_end_of_the_block(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path, durable) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_file_stays_as_it_was_where_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="half"), replacing(path) as file:
        file.write(b"new")
        raise ValueError("half of it")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_sha256_of_blocks_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one two")
    expected = hashlib.sha256(b"one two").hexdigest()
    assert sha256_of(tmp_path / "x") == sha256_of_blocks([b"one", b" ", b"two"]) == expected
