"""A separate folder for the server's temporary files, which the next start removes after a kill."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from lib.errors import ConfigError

logger = logging.getLogger("unetr.server")

PREFIX = "unetr-server-"
LOCK = "lock"
SECONDS_TO_BE_LOCKED = 60.0
_LOG_CONFIGURATION = re.compile(r"tmp\w{8}\.json")


@contextmanager
def own_temporary_folder() -> Iterator[Path]:
    """Within the block, temporary files of this process and its child processes go into a separate folder.

    Raises:
        ConfigError: if no folder for temporary files is writable.
    """
    base = Path(tempfile.gettempdir())
    remove_left_behind(base)
    try:
        folder, lock = _make(base)
    except OSError as error:
        raise ConfigError(f"no temporary file can be written to {str(base)!r}: {error.strerror or error}") from error
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    variable, os.environ["TMPDIR"] = os.environ.get("TMPDIR"), str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        if variable is None:
            os.environ.pop("TMPDIR", None)
        else:
            os.environ["TMPDIR"] = variable
        lock.release()
        shutil.rmtree(folder, ignore_errors=True)


def _make(base: Path) -> tuple[Path, BaseFileLock]:
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    lock = FileLock(folder / LOCK)
    lock.acquire(timeout=SECONDS_TO_BE_LOCKED)
    return folder, lock


def remove_left_behind(base: Path) -> list[Path]:
    """Remove the folders of servers that no longer run, whose locks the operating system has released.

    Returns:
        The removed folders.
    """
    left = [folder for folder in base.glob(f"{PREFIX}*") if folder.is_dir() and not _is_held(folder)]
    for folder in left:
        logger.info("removed temporary files that a killed server has left: %s", folder)
        shutil.rmtree(folder, ignore_errors=True)
    return left


def _is_held(folder: Path) -> bool:
    """Whether a server uses a folder, or another user's server does, whose lock is not accessible."""
    try:
        if not (folder / LOCK).exists():  # just created, or partly removed
            return time.time() - folder.stat().st_mtime < SECONDS_TO_BE_LOCKED
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return True
    lock.release()
    return False


def remove_log_configuration(log_config: object, arguments: Sequence[str] = tuple(sys.argv)) -> bool:
    """Remove the file that MONAI Label created for its logging configuration, after it has been read.

    Args:
        log_config: the logging configuration passed to uvicorn.
        arguments: the process's command line; a file named there belongs to the user.

    Returns:
        Whether there was such a file.
    """
    path = Path(log_config) if isinstance(log_config, str) else Path()
    named = any(argument.startswith(("-l", "--log_config")) for argument in arguments)
    if named or not _LOG_CONFIGURATION.fullmatch(path.name) or path.parent != Path(tempfile.gettempdir()):
        return False
    path.unlink(missing_ok=True)
    return True
