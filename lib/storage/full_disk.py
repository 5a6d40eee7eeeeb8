"""A disk that is full or cannot be written to, told alike whichever library finds it."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from lib.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter", "unexpected pos")
"""What PyTorch says when it cannot write a file; it does not say why."""


def storage_problem(error: BaseException) -> str:
    """Why something could not be written, in words; empty for an error of another kind."""
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


@contextmanager
def writing(what: str) -> Iterator[None]:
    """Say what was not kept where a disk does not take it.

    Raises:
        StorageError: with the reason.
    """
    try:
        yield
    except (OSError, RuntimeError, sqlite3.OperationalError) as error:
        problem = storage_problem(error)
        if not problem:
            raise
        raise StorageError(f"{what} was not kept: {problem}; make room, and try again") from error
