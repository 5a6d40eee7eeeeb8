"""A full disk is told alike, whichever library finds it."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest
import torch
from starlette.exceptions import HTTPException

from lib.errors import StorageError
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.server.http.errors import describe, error_response, status_of
from lib.storage.disk import has_room
from lib.storage.full_disk import access_problem, storage_problem, writing
from tests.small_disk import mounted
from tests.tiny import tiny_preset

FULL: list[Exception] = [
    OSError(errno.ENOSPC, "No space left on device"),
    sqlite3.OperationalError("database or disk is full"),
    sqlite3.OperationalError("attempt to write a readonly database"),
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
]


@pytest.mark.parametrize("error", FULL, ids=repr)
def test_disk_that_takes_nothing_is_507_with_a_sentence(error: Exception) -> None:
    assert status_of(error) == 507
    assert storage_problem(error) in describe(error, 507)
    with pytest.raises(StorageError, match="the state was not kept"), writing("the state"):
        raise error


ACCESS: list[Exception] = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EPERM, "Operation not permitted"),
    OSError(errno.EIO, "Input/output error"),
    sqlite3.OperationalError("unable to open database file"),
    sqlite3.OperationalError("disk I/O error"),
]


@pytest.mark.parametrize("error", [*ACCESS, sqlite3.DatabaseError("database disk image is malformed")], ids=repr)
def test_file_that_cannot_be_used_is_507_with_a_sentence(error: Exception) -> None:
    assert status_of(error) == 507 and not storage_problem(error), "a training would wait for room"
    assert access_problem(error) in describe(error, 507) and "nothing was kept" not in describe(error, 507)


@pytest.mark.parametrize("error", ACCESS, ids=repr)
def test_write_without_permission_is_told_without_asking_for_room(error: Exception) -> None:
    with pytest.raises(StorageError, match=f"the state was not kept: {access_problem(error)}$"), writing("the state"):
        raise error


@pytest.mark.parametrize("error", [sqlite3.OperationalError("database is locked"), OSError(errno.EMFILE, "many")])
def test_what_is_in_use_is_503_with_a_time_to_come_back(error: Exception) -> None:
    answer = error_response(error)
    assert answer.status_code == 503 and answer.headers["retry-after"] == "5" and b"BusyError" in answer.body


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "x"), sqlite3.OperationalError("no such table"), RuntimeError("x")]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert status_of(error) == 500
    with pytest.raises(type(error)), writing("the state"):
        raise error


def test_checkpoint_that_a_disk_does_not_take_is_a_sentence(tmp_path: Path) -> None:
    weights = Checkpoint({"a": torch.zeros(100_000)}, tiny_preset())
    with mounted(tmp_path / "disk", 1) as disk:
        write_checkpoint(disk.folder / "w.pt", weights)
        kept = (disk.folder / "w.pt").read_bytes()
        disk.fill()
        with pytest.raises(StorageError, match=r"checkpoint 'w\.pt' was not kept: the disk is full"):
            write_checkpoint(disk.folder / "w.pt", weights)
        assert (disk.folder / "w.pt").read_bytes() == kept
        assert not has_room(disk.folder, 4096)
        disk.make_room()
        assert has_room(disk.folder, 4096) and not has_room(disk.folder, 2**21)
        disk.set_read_only(True)
        assert not has_room(disk.folder, 4096)


def test_error_of_a_disk_is_found_in_what_was_made_of_it() -> None:
    with pytest.raises(HTTPException) as wrapped:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise HTTPException(400, "There was an error parsing the body") from error
    assert status_of(wrapped.value) == 507
    assert describe(wrapped.value, 507) == "nothing was kept: on the server, the disk is full"
