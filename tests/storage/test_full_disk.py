"""A full disk is told alike, whichever library finds it."""

from __future__ import annotations

import errno
import sqlite3
import sys
from pathlib import Path

import pytest
import torch

from lib.errors import StorageError
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.server.http.errors import describe, status_of
from lib.storage.full_disk import storage_problem, writing
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


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "x"), sqlite3.OperationalError("locked"), RuntimeError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert status_of(error) == 500
    with pytest.raises(type(error)), writing("the state"):
        raise error


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_checkpoint_that_a_disk_does_not_take_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    full = lambda path, *a, **k: opened(Path("/dev/full") if path.suffix == ".tmp" else path, *a, **k)  # noqa: E731
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StorageError, match=r"checkpoint 'w\.pt' was not kept: the disk is full"):
        write_checkpoint(tmp_path / "w.pt", Checkpoint({"a": torch.zeros(100_000)}, tiny_preset()))
