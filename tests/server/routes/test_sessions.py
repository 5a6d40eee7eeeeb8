"""Sessions end when their time is up, whether or not anybody has looked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from monailabel.utils.sessions import Sessions

from lib.server.routes.sessions import has_ended


def test_session_ends_so_many_seconds_after_it_was_last_asked_for(tmp_path: Path) -> None:
    image = tmp_path / "image.nii"
    image.write_bytes(b"image")
    _, session = Sessions(str(tmp_path / "sessions")).add_session(str(image), expiry=2)
    os.utime(Path(session.path) / "meta.info", (1000.75, 1000.75))
    assert [has_ended(session, now) for now in (1000.9, 1002.7, 1002.75, 1003.7)] == [False, False, True, True]


@pytest.mark.parametrize("seconds", [1, 3600])
def test_session_without_its_file_has_ended(tmp_path: Path, seconds: int) -> None:
    image = tmp_path / "image.nii"
    image.write_bytes(b"image")
    _, session = Sessions(str(tmp_path / "sessions")).add_session(str(image), expiry=seconds)
    (Path(session.path) / "meta.info").unlink()
    assert has_ended(session, 0.0)
