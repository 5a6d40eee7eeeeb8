"""The SQLite index of a label history, which can be rebuilt from the files that it describes."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.storage.sqlite import open_database

SCHEMA = """
CREATE TABLE IF NOT EXISTS versions(
    sequence INTEGER PRIMARY KEY, version_id TEXT UNIQUE NOT NULL, image_id TEXT NOT NULL, tag TEXT NOT NULL,
    removal INTEGER NOT NULL, record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS by_image ON versions(image_id, tag, sequence);
CREATE TABLE IF NOT EXISTS published(
    image_id TEXT NOT NULL, tag TEXT NOT NULL, sequence INTEGER NOT NULL, suffix TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, PRIMARY KEY(image_id, tag));
CREATE TABLE IF NOT EXISTS infos(
    image_id TEXT NOT NULL, tag TEXT NOT NULL, info TEXT NOT NULL, PRIMARY KEY(image_id, tag));
CREATE TABLE IF NOT EXISTS refused(name TEXT PRIMARY KEY, stamp TEXT NOT NULL, reason TEXT NOT NULL);
"""
NEWEST = "sequence IN (SELECT max(sequence) FROM versions WHERE tag = ? GROUP BY image_id)"


class VersionIndex:
    """Indexes versions by image and time, the files in ``labels/<tag>``, and information that clients added.

    Args:
        path: the file; :data:`~lib.storage.sqlite.IN_MEMORY` for a store without write permission.
    """

    def __init__(self, path: Path) -> None:
        self._db, self.opened_with = open_database(path, SCHEMA)
        self._lock = threading.RLock()

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all statements of the block or none."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    # ------------------------------------------------------------------------------------------------ versions

    def insert(self, record: Mapping[str, Any]) -> None:
        """Add a version's record."""
        removal = int(bool(record.get("removal")))
        identity = (record["sequence"], record["version_id"], record["image_id"], record["tag"])
        self._execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", *identity, removal, json.dumps(record))

    def drop(self, sequence: int) -> None:
        """Delete a version's record."""
        self._execute("DELETE FROM versions WHERE sequence = ?", sequence)

    def records(self) -> dict[int, dict[str, Any]]:
        """All records by sequence, including removals."""
        return {row["sequence"]: json.loads(row["record"]) for row in self._execute("SELECT * FROM versions")}

    def newest(self, image_id: str, tag: str) -> dict[str, Any] | None:
        """The newest record of an image's label, which may be a removal."""
        records = self._select("image_id = ? AND tag = ? ORDER BY sequence DESC LIMIT 1", image_id, tag)
        return records[0] if records else None

    def all_newest(self, tag: str) -> list[dict[str, Any]]:
        """The newest record of each image that has a label."""
        return self._select(f"removal = 0 AND {NEWEST} ORDER BY sequence", tag)

    def of_image(self, image_id: str, tag: str) -> list[dict[str, Any]]:
        """All records of an image's label except removals, oldest first."""
        return self._select("removal = 0 AND image_id = ? AND tag = ? ORDER BY sequence", image_id, tag)

    def since(self, sequence: int) -> list[dict[str, Any]]:
        """All records after that one, oldest first, including removals."""
        return self._select("sequence > ? ORDER BY sequence", sequence)

    def find(self, version_id: str) -> dict[str, Any] | None:
        """The record with this id, unless it is a removal."""
        records = self._select("removal = 0 AND version_id = ?", version_id)
        return records[0] if records else None

    def tags(self) -> list[str]:
        """All tags of current and former labels."""
        return [row["tag"] for row in self._execute("SELECT DISTINCT tag FROM versions ORDER BY tag")]

    def count(self) -> int:
        """Number of versions."""
        return int(self._execute("SELECT count(*) AS n FROM versions WHERE removal = 0")[0]["n"])

    def last_sequence(self) -> int:
        """The largest sequence number; 0 if there is none."""
        return int(self._execute("SELECT coalesce(max(sequence), 0) AS n FROM versions")[0]["n"])

    # --------------------------------------------------------------------------------- what lies in labels/<tag>

    def note_published(self, image_id: str, tag: str, sequence: int, suffix: str, size: int, mtime_ns: int) -> None:
        """Record a file in ``labels/<tag>`` with its size and time, by which it is recognised."""
        values = (image_id, tag, sequence, suffix, size, mtime_ns)
        self._execute("INSERT OR REPLACE INTO published VALUES (?, ?, ?, ?, ?, ?)", *values)

    def forget_published(self, image_id: str, tag: str) -> None:
        """Record that there is no file in ``labels/<tag>``."""
        self._execute("DELETE FROM published WHERE image_id = ? AND tag = ?", image_id, tag)

    def published(self, image_id: str, tag: str) -> sqlite3.Row | None:
        """The record of the file last copied there."""
        rows = self._execute("SELECT * FROM published WHERE image_id = ? AND tag = ?", image_id, tag)
        return rows[0] if rows else None

    def newest_and_published(self) -> list[sqlite3.Row]:
        """For each label: image, tag, newest sequence, and the record of the file last copied to ``labels/<tag>``."""
        return self._execute(
            "SELECT v.image_id, v.tag, v.sequence, p.sequence AS published, p.suffix, p.size, p.mtime_ns "
            "FROM versions v LEFT JOIN published p ON p.image_id = v.image_id AND p.tag = v.tag WHERE v.removal = 0 "
            "AND v.sequence IN (SELECT max(sequence) FROM versions GROUP BY image_id, tag) ORDER BY v.sequence"
        )

    # ------------------------------------------------------------------- what clients added to images and labels

    def infos(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Added information by image and tag; the tag is empty for the image itself."""
        rows = self._execute("SELECT * FROM infos")
        return {(row["image_id"], row["tag"]): json.loads(row["info"]) for row in rows}

    def info(self, image_id: str, tag: str) -> dict[str, Any]:
        """Information that clients added to an image or a label; empty if there is none."""
        rows = self._execute("SELECT info FROM infos WHERE image_id = ? AND tag = ?", image_id, tag)
        added: dict[str, Any] = json.loads(rows[0]["info"]) if rows else {}
        return added

    def keep_info(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Store the information, replacing earlier information."""
        text = json.dumps(info, default=str)
        self._execute("INSERT OR REPLACE INTO infos VALUES (?, ?, ?)", image_id, tag, text)

    def forget_info(self, image_id: str, tag: str) -> None:
        """Delete what clients added to a label's information."""
        self._execute("DELETE FROM infos WHERE image_id = ? AND tag = ?", image_id, tag)

    # -------------------------------------------------------------- refused files in labels/final

    def refused(self) -> dict[str, tuple[str, str]]:
        """Refused files: size and time at the check, and the reason, by file name."""
        return {row["name"]: (row["stamp"], row["reason"]) for row in self._execute("SELECT * FROM refused")}

    def keep_refused(self, name: str, stamp: str, reason: str) -> None:
        """Record that a file is refused."""
        self._execute("INSERT OR REPLACE INTO refused VALUES (?, ?, ?)", name, stamp, reason)

    def forget_refused(self, name: str) -> None:
        """Record that a file is no longer refused."""
        self._execute("DELETE FROM refused WHERE name = ?", name)

    def _select(self, where: str, *values: object) -> list[dict[str, Any]]:
        return [
            json.loads(row["record"]) for row in self._execute(f"SELECT record FROM versions WHERE {where}", *values)
        ]

    def _execute(self, statement: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()
