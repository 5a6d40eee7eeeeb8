"""Sessions end when their time is up, whether or not anybody has looked."""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from monailabel.utils.sessions import Sessions

from lib.errors import NotFoundError
from lib.server.http.auth import EVERYBODY
from lib.server.routes.sessions import find_session, has_ended, remove_session, session_image


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


def test_session_that_another_thread_removes_is_gone(tmp_path: Path) -> None:
    """Two removals at the same moment, and a look at it in between, ended in a KeyError or a missing file."""
    sessions = Sessions(str(tmp_path / "sessions"))
    for number in range(30):
        image = tmp_path / "image.nii"
        image.write_bytes(b"image")
        session_id, _ = sessions.add_session(str(image), session_id=str(uuid.uuid4()))
        start = threading.Barrier(4)

        def remove(name: str = session_id, start: threading.Barrier = start) -> bool:
            start.wait(10)
            try:
                remove_session(EVERYBODY, sessions, name)
                return True
            except NotFoundError:
                return False

        def look(name: str = session_id, start: threading.Barrier = start) -> bool:
            start.wait(10)
            with contextlib.suppress(NotFoundError):
                session_image(sessions, name)
            return False

        with ThreadPoolExecutor(4) as pool:
            done = [task.result(20) for task in [pool.submit(one) for one in (remove, look, remove, look)]]
        assert sum(done) == 1, number


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"path": 1}', "null"])
def test_session_whose_record_is_damaged_is_not_found(tmp_path: Path, content: str) -> None:
    image = tmp_path / "image.nii"
    image.write_bytes(b"image")
    session_id, session = Sessions(str(tmp_path / "sessions")).add_session(str(image), session_id=str(uuid.uuid4()))
    (Path(session.path) / "meta.info").write_text(content)
    with pytest.raises(NotFoundError):
        find_session(Sessions(str(tmp_path / "sessions")), session_id)
