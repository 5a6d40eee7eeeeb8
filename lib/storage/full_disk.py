"""Reports a full or read-only disk in the same way, whichever library notices it."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from lib.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
DAMAGED = ("malformed", "not a database")
TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "unexpected pos")
"""Messages of PyTorch when it cannot write a file; they do not state the reason."""


def storage_problem(error: BaseException) -> str:
    """Why a file could not be written, in words; empty for another kind of error."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        return storage_problem(error.__cause__)
    if isinstance(error, OSError):
        return (
            "the disk is full"
            if error.errno in FULL
            else "it cannot be written to"
            if error.errno == errno.EROFS
            else ""
        )
    if isinstance(error, sqlite3.OperationalError):
        text = str(error)
        return "the disk is full" if "full" in text else "it cannot be written to" if "readonly" in text else ""
    if isinstance(error, RuntimeError) and any(part in str(error) for part in TORCH_WRITER):
        return "the disk is full, or cannot be written to"
    return ""


ACCESS = {
    errno.EACCES: "permission is missing",
    errno.EPERM: "permission is missing",
    errno.EIO: "the disk reports an error",
    errno.ESTALE: "the network drive has lost the file",
}


def access_problem(error: BaseException) -> str:
    """Why a file cannot be read or written though there is room, in words; empty for an error of another kind."""
    if isinstance(error, OSError):
        return ACCESS.get(error.errno or 0, "")
    if isinstance(error, sqlite3.OperationalError):
        text = str(error)
        return "an index cannot be read or written" if "unable to open" in text or "disk I/O" in text else ""
    if isinstance(error, sqlite3.DatabaseError) and any(word in str(error) for word in DAMAGED):
        return "an index is damaged, and is made anew at the next start"
    return ""


def is_passing(error: BaseException) -> bool:
    """Whether something is only in use by too many at the moment."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Raise a storage error that names what could not be stored.

    Raises:
        StorageError: with the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, sqlite3.OperationalError) as error:
        if problem := storage_problem(error):
            raise StorageError(f"{what} was not kept: {problem}; make room, and try again") from error
        if problem := access_problem(error):
            raise StorageError(f"{what} was not kept: {problem}") from error
        raise
