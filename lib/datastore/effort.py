"""Annotation effort: prompts and seconds from the hand-out of a case to a client until the submission of its label.

The server counts them for each client and case, so that all clients are covered, and stores them in SQLite across
restarts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.storage.sqlite import IN_MEMORY, open_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS work(
    image_id TEXT NOT NULL, client TEXT NOT NULL, handed_out REAL, prompts INTEGER NOT NULL,
    PRIMARY KEY(image_id, client));
"""


@dataclass(frozen=True)
class Effort:
    """The effort of a client for a case.

    Attributes:
        prompts: number of prompts to interactive models for this case since the hand-out.
        seconds: time since the hand-out of the case; None if the client opened the case without one.
    """

    prompts: int = 0
    seconds: float | None = None


class EffortCounter:
    """The cases on which clients are working.

    Args:
        path: SQLite file; :data:`lib.datastore.index.IN_MEMORY` for a store that can only be read.
        now: current time in seconds since 1970.
    """

    def __init__(self, path: Path = IN_MEMORY, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._db, self.repaired = open_database(path, SCHEMA)
        self._lock = threading.RLock()

    def hand_out(self, image_id: str, client: str) -> None:
        """Record the hand-out of a case to a client; repeating it for the same case changes nothing."""
        self._execute(
            "INSERT INTO work VALUES (?, ?, ?, 0) ON CONFLICT(image_id, client) DO UPDATE SET "
            "handed_out = coalesce(handed_out, excluded.handed_out)",
            image_id, client, self._now(),
        )  # fmt: skip

    def count_prompt(self, image_id: str, client: str) -> None:
        """Record that a client sent a prompt to an interactive model: a click, a scribble or a box."""
        self._execute(
            "INSERT INTO work VALUES (?, ?, NULL, 1) ON CONFLICT(image_id, client) DO UPDATE SET prompts = prompts + 1",
            image_id, client,
        )  # fmt: skip

    def find(self, image_id: str, client: str) -> Effort:
        """The effort of a client for a case so far."""
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM work WHERE image_id = ? AND client = ?", (image_id, client)
            ).fetchone()
        if row is None:
            return Effort()
        handed_out = row["handed_out"]
        seconds = None if handed_out is None else max(0.0, self._now() - handed_out)  # the clock may have been set back
        return Effort(row["prompts"], seconds)

    def finish(self, image_id: str, client: str) -> None:
        """Record that the client has submitted a label; later work on this case is counted anew."""
        self._execute("DELETE FROM work WHERE image_id = ? AND client = ?", image_id, client)

    def forget(self, image_id: str) -> None:
        """An image is removed; what was spent on it is not spent on the next of its id."""
        self._execute("DELETE FROM work WHERE image_id = ?", image_id)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _execute(self, statement: str, *values: object) -> None:
        with self._lock:
            self._db.execute(statement, values)
