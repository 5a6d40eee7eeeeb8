"""JSON files that somebody else may have put there, damaged or made something else of."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.server.http.parameters import parse_object
from lib.storage.json_files import MOST_BYTES, read_json, read_object, write_json


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None, "\u00fc"], "nan": float("nan")})
    assert read_json(tmp_path / "a.json") == read_object(tmp_path / "a.json") == {"a": [1, None, "\u00fc"], "nan": None}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"a": ',
        b"\xff\xfe",
        bytes(range(256)),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": [NaN]}',
        b'{"a": {"b": 1e999}}',
        b'{"a": -Infinity}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": 9223372036854775808}',
        b"[" * 41 + b"]" * 41,
    ],
    ids=[
        "empty",
        "half",
        "binary",
        "all bytes",
        "deep",
        "deep object",
        "long number",
        "NaN",
        "overflow",
        "infinity",
        "surrogate",
        "surrogate as key",
        "beyond 64 bits",
        "41 levels",
    ],
)
def test_what_is_no_json_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
    assert read_object(tmp_path / "a.json") == {}


def test_what_others_keep_beside_their_own_is_read_however_deep_a_client_may_send_it(tmp_path: Path) -> None:
    sent = parse_object('{"a": ' * 19 + "9223372036854775807" + "}" * 19)
    write_json(tmp_path / "a.json", {"info": {"sent": sent}})
    assert read_json(tmp_path / "a.json") == {"info": {"sent": sent}}


def test_file_that_is_too_large_is_a_value_error(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.write(b"5")
        file.truncate(10 * MOST_BYTES)  # holes take no disk
    with pytest.raises(ValueError, match="larger than"):
        read_json(tmp_path / "a.json")


@pytest.mark.skipif(os.name == "nt", reason="needs FIFOs of POSIX")
def test_what_is_no_regular_file_is_an_error_of_the_system_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("fifo", "folder", "loop", "missing"):
        with pytest.raises(OSError):
            read_json(tmp_path / f"{name}.json")
        assert read_object(tmp_path / f"{name}.json") == {}


@pytest.mark.parametrize("text", ["[]", "5", "null", '"a"', "true"])
def test_other_json_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert read_object(tmp_path / "a.json") == {}
