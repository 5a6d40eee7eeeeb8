"""SQLite files in WAL mode, opened in the same way everywhere, and replaced if they are damaged."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path
from typing import Literal

IN_MEMORY = Path(":memory:")
SECONDS_TO_WAIT_FOR_OTHERS = 30.0
SIDE_FILES = ("-wal", "-shm")


def connect(
    path: Path,
    timeout_seconds: float = SECONDS_TO_WAIT_FOR_OTHERS,
    isolation_level: Literal["DEFERRED"] | None = "DEFERRED",
    one_thread: bool = False,
) -> sqlite3.Connection:
    """Open an SQLite file in WAL mode; it is created if it does not exist.

    Commits do not wait for the disk (``synchronous=NORMAL``): they survive the end of the process, but not a power
    failure.

    Args:
        path: the file.
        timeout_seconds: time limit for locks of other processes.
        isolation_level: ``None`` for autocommit.
        one_thread: whether SQLite refuses other threads; otherwise the caller has to lock.

    Raises:
        sqlite3.DatabaseError: if the file is damaged, or if its folder is not writable.
    """
    connection = sqlite3.connect(
        path, timeout=timeout_seconds, isolation_level=isolation_level, check_same_thread=one_thread
    )
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def open_database(
    path: Path, schema: str, isolation_level: Literal["DEFERRED"] | None = None
) -> tuple[sqlite3.Connection, str]:
    """Open an SQLite file in WAL mode; it is created if it does not exist, and replaced if it is damaged.

    Rows lost in a power failure are restored by the caller, from the files that they describe.

    Args:
        path: the file; :data:`IN_MEMORY` for none.
        schema: statements that create missing tables.
        isolation_level: ``None`` for autocommit.

    Returns:
        The connection, for all threads (one at a time), and a sentence on a replacement.

    Raises:
        OSError, sqlite3.OperationalError: if the folder is not writable.
    """
    try:
        return _open(path, schema, isolation_level), ""
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        os.replace(path, aside)
        remove_side_files(path)
        sentence = f"{path.name} was damaged ({error}); it is kept as {aside.name} and made anew"
        return _open(path, schema, isolation_level), sentence


def add_column(connection: sqlite3.Connection, table: str, column: str, declaration: str) -> None:
    """Add a column to a table of an older file that lacks it; existing rows get the default of its declaration."""
    if column in [row["name"] for row in connection.execute(f"PRAGMA table_info({table})")]:
        return
    try:
        connection.execute(f"ALTER TABLE {table} ADD COLUMN {column} {declaration}")
    except sqlite3.OperationalError as error:  # another process has added it
        if "duplicate column" not in str(error):
            raise


def remove_side_files(path: Path) -> None:
    """Remove the write-ahead log of a database that no longer exists."""
    for suffix in SIDE_FILES:
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _open(path: Path, schema: str, isolation_level: Literal["DEFERRED"] | None) -> sqlite3.Connection:
    connection = connect(path, isolation_level=isolation_level)
    try:
        connection.row_factory = sqlite3.Row
        result = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise sqlite3.DatabaseError(str(result).splitlines()[0])
        connection.executescript(schema)
    except BaseException:
        connection.close()
        raise
    return connection
