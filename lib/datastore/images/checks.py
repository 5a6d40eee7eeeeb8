"""Stored checks of images: which ones a preset cannot segment, and which are unusual; valid until the file changes."""

from __future__ import annotations

import sqlite3
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from lib.storage.sqlite import IN_MEMORY, add_column, open_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS checks(
    image_id TEXT NOT NULL, preset TEXT NOT NULL, stamp TEXT NOT NULL, problem TEXT NOT NULL, warning TEXT NOT NULL,
    at REAL NOT NULL, elsewhere INTEGER NOT NULL DEFAULT 0, PRIMARY KEY(image_id, preset));
"""
COLUMNS = "image_id, preset, stamp, problem, warning, elsewhere"


@dataclass(frozen=True)
class ImageCheck:
    """The result of checking whether an image can be segmented by a preset.

    Attributes:
        image_id: id of the image.
        preset: preset whose spacing, size and intensity limits were applied.
        stamp: value that changes with the image's file.
        problem: why it cannot be segmented; empty if it can.
        warning: what is unusual about it; empty for nothing.
        elsewhere: whether the only problem is that another served preset suits the image better.
    """

    image_id: str
    preset: str
    stamp: str
    problem: str = ""
    warning: str = ""
    elsewhere: bool = False


class ImageChecks:
    """Checks of one store's images, shared by its processes.

    Args:
        path: SQLite file; :data:`lib.datastore.index.IN_MEMORY` for a store that can only be read.
    """

    def __init__(self, path: Path = IN_MEMORY) -> None:
        self._db, self.repaired = open_database(path, SCHEMA)
        add_column(self._db, "checks", "elsewhere", "INTEGER NOT NULL DEFAULT 0")
        self._lock = threading.RLock()

    def keep(self, check: ImageCheck) -> None:
        """Store a check, replacing an earlier one."""
        row = (check.image_id, check.preset, check.stamp, check.problem, check.warning, check.elsewhere, time.time())
        with self._lock:
            self._db.execute(f"INSERT OR REPLACE INTO checks({COLUMNS}, at) VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def find(self, image_id: str, preset: str, stamp: str) -> ImageCheck | None:
        """The check of an image in its current state; None if it was not checked since it changed."""
        query = f"SELECT {COLUMNS} FROM checks WHERE image_id = ? AND preset = ? AND stamp = ?"
        with self._lock:
            row = self._db.execute(query, (image_id, preset, stamp)).fetchone()
        return None if row is None else _check(row)

    def of_image(self, image_id: str) -> list[ImageCheck]:
        """The checks of an image by all presets, whether or not the image has changed since."""
        query = f"SELECT {COLUMNS} FROM checks WHERE image_id = ?"
        with self._lock:
            return [_check(row) for row in self._db.execute(query, (image_id,)).fetchall()]

    def remarkable(self) -> list[ImageCheck]:
        """The checks with a problem or a warning, whether or not the images have changed since."""
        query = f"SELECT {COLUMNS} FROM checks WHERE problem != '' OR warning != '' ORDER BY image_id"
        with self._lock:
            return [_check(row) for row in self._db.execute(query).fetchall()]

    def forget(self, image_id: str) -> None:
        """Delete the checks of an image, so that it is checked again."""
        with self._lock:
            self._db.execute("DELETE FROM checks WHERE image_id = ?", (image_id,))

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()


def _check(row: sqlite3.Row) -> ImageCheck:
    return ImageCheck(**(dict(row) | {"elsewhere": bool(row["elsewhere"])}))
