"""Annotation effort: prompts and seconds from the moment at which a client is handed a case until it submits a label.

Counted in the server, for each client and case, so that it holds for every client; over restarts, in SQLite.
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
    """What a client spent on a case.

    Attributes:
        prompts: how often it asked an interactive model for this case since then.
        seconds: since the case was handed out to it; None where it took the case by itself.
    """

    prompts: int = 0
    seconds: float | None = None


class EffortCounter:
    """The cases that clients are at work on.

    Args:
        path: SQLite file; :data:`lib.datastore.index.IN_MEMORY` for a store that can only be read.
        now: the time in seconds since 1970.
    """

    def __init__(self, path: Path = IN_MEMORY, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._db, self.repaired = open_database(path, SCHEMA)
        self._lock = threading.RLock()

    def hand_out(self, image_id: str, client: str) -> None:
        """A client was handed a case; the same case once more changes nothing."""
        self._execute(
            "INSERT INTO work VALUES (?, ?, ?, 0) ON CONFLICT(image_id, client) DO UPDATE SET "
            "handed_out = coalesce(handed_out, excluded.handed_out)",
            image_id, client, self._now(),
        )  # fmt: skip

    def count_prompt(self, image_id: str, client: str) -> None:
        """A client asked an interactive model for a case: a click, a scribble, a box."""
        self._execute(
            "INSERT INTO work VALUES (?, ?, NULL, 1) ON CONFLICT(image_id, client) DO UPDATE SET prompts = prompts + 1",
            image_id, client,
        )  # fmt: skip

    def find(self, image_id: str, client: str) -> Effort:
        """What a client has spent on a case so far."""
        with self._lock:
            row = self._db.execute(
                "SELECT * FROM work WHERE image_id = ? AND client = ?", (image_id, client)
            ).fetchone()
        if row is None:
            return Effort()
        handed_out = row["handed_out"]
        seconds = None if handed_out is None else max(0.0, self._now() - handed_out)  # the clock may have been put back
        return Effort(row["prompts"], seconds)

    def finish(self, image_id: str, client: str) -> None:
        """The client has submitted; what it does next with this case counts anew."""
        self._execute("DELETE FROM work WHERE image_id = ? AND client = ?", image_id, client)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    def _execute(self, statement: str, *values: object) -> None:
        with self._lock:
            self._db.execute(statement, values)
