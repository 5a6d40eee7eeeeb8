"""Leases of cases to annotators, and skipped cases, so that two clinicians never do the same work.

A lease ends when the label is submitted or when its time is over; every request of its client renews it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.errors import NotFoundError
from lib.storage.sqlite import IN_MEMORY, open_database

DEFAULT_MINUTES = 30.0
# A renewal that would extend the lease by less than this share of its length is not stored.
RENEWAL_SHARE = 0.05
SCHEMA = """
CREATE TABLE IF NOT EXISTS leases(
    image_id TEXT PRIMARY KEY, client TEXT NOT NULL, since REAL NOT NULL, until REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_client ON leases(client);
CREATE TABLE IF NOT EXISTS skips(
    image_id TEXT PRIMARY KEY, client TEXT NOT NULL, reason TEXT NOT NULL, at REAL NOT NULL);
"""


@dataclass(frozen=True)
class Lease:
    """A lease of a case to a client; times are in seconds since 1970."""

    image_id: str
    client: str
    since: float
    until: float

    def describe(self) -> dict[str, Any]:
        """The lease as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Skip:
    """A case that is not handed out, with the reason; the time is in seconds since 1970."""

    image_id: str
    client: str
    reason: str
    at: float

    def describe(self) -> dict[str, Any]:
        """The skip as JSON data."""
        return asdict(self)


class Leases:
    """The leases and skipped cases of a store, kept across restarts and shared by its processes.

    Args:
        path: SQLite file; :data:`lib.datastore.index.IN_MEMORY` for a store that can only be read.
        minutes: duration of a lease.
        now: current time in seconds since 1970.
    """

    def __init__(
        self, path: Path = IN_MEMORY, minutes: float = DEFAULT_MINUTES, now: Callable[[], float] = time.time
    ) -> None:
        self.seconds = minutes * 60
        self._now = now
        self._db, self.repaired = open_database(path, SCHEMA)
        self._lock = threading.RLock()

    def take(self, image_id: str, client: str) -> Lease | None:
        """Lease a case to a client, or renew its lease; None if another client has it."""
        with self._lock:
            now = self._now()
            self._shorten(now)
            # A single statement ensures that only one of two processes succeeds.
            self._db.execute(
                "INSERT INTO leases VALUES (?, ?, ?, ?) ON CONFLICT(image_id) DO UPDATE SET "
                "since = CASE WHEN client = excluded.client AND until > excluded.since THEN since "
                "ELSE excluded.since END, client = excluded.client, until = excluded.until "
                "WHERE client = excluded.client OR until <= excluded.since",
                (image_id, client, now, now + self.seconds),
            )
            row = self._db.execute("SELECT * FROM leases WHERE image_id = ?", (image_id,)).fetchone()
            return Lease(**row) if row["client"] == client else None

    def renew(self, client: str) -> int:
        """Renew all leases of a client for their full time; returns their number."""
        with self._lock:
            now = self._now()
            held = [lease for lease in self.active().values() if lease.client == client]
            enough = now + self.seconds * (1 - RENEWAL_SHARE)
            if any(lease.until < enough for lease in held):
                values = (now + self.seconds, client, now)
                self._db.execute("UPDATE leases SET until = ? WHERE client = ? AND until > ?", values)
            return len(held)

    def release(self, image_id: str) -> None:
        """End the lease of a case, whoever holds it."""
        with self._lock:
            if self._db.execute("SELECT 1 FROM leases WHERE image_id = ?", (image_id,)).fetchone():
                self._db.execute("DELETE FROM leases WHERE image_id = ?", (image_id,))

    def active(self) -> dict[str, Lease]:
        """The current leases, by image."""
        with self._lock:
            now = self._now()
            self._shorten(now)
            rows = self._db.execute("SELECT * FROM leases WHERE until > ?", (now,)).fetchall()
        return {row["image_id"]: Lease(**row) for row in rows}

    def _shorten(self, now: float) -> None:
        """Let leases that start in the future, because the clock was set back, start now."""
        latest = now + self.seconds + 1
        if self._db.execute("SELECT 1 FROM leases WHERE until > ?", (latest,)).fetchone():
            self._db.execute(
                "UPDATE leases SET since = MIN(since, ?), until = ? WHERE until > ?", (now, now + self.seconds, latest)
            )

    def skip(self, image_id: str, client: str, reason: str) -> Skip:
        """Exclude a case from being handed out; its lease ends."""
        with self._lock:
            skip = Skip(image_id, client, reason, self._now())
            values = (skip.image_id, skip.client, skip.reason, skip.at)
            self._db.execute("INSERT OR REPLACE INTO skips VALUES (?, ?, ?, ?)", values)
            self.release(image_id)
            return skip

    def unskip(self, image_id: str) -> None:
        """Allow a case to be handed out again.

        Raises:
            NotFoundError: if it is not skipped.
        """
        with self._lock:
            if not self._db.execute("DELETE FROM skips WHERE image_id = ?", (image_id,)).rowcount:
                raise NotFoundError("skipped image", image_id[:200])

    def skipped(self) -> dict[str, Skip]:
        """The skipped cases, by image."""
        with self._lock:
            rows = self._db.execute("SELECT * FROM skips ORDER BY at").fetchall()
        return {row["image_id"]: Skip(**row) for row in rows}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()
