"""Stores for each version its scores and embeddings of the cases, and its disagreement with labels.

There is one SQLite file for each preset. The scoring process writes one case at a time, so that it can be stopped at
any moment and later continue; the server reads new rows with each query.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lib.activelearning.case_scores import CaseScores
from lib.activelearning.embedding import FloatArray
from lib.storage.sqlite import add_column, open_database

logger = logging.getLogger("unetr.scoring")

SCORES_FILE = "scores.sqlite"
UNTRAINED = "untrained"
SCHEMA = """
CREATE TABLE IF NOT EXISTS looks(
    sequence INTEGER PRIMARY KEY AUTOINCREMENT, version TEXT NOT NULL, image_id TEXT NOT NULL, at REAL NOT NULL,
    scores TEXT, foreground REAL, embedding BLOB, problem TEXT,
    elsewhere INTEGER NOT NULL DEFAULT 0, UNIQUE(version, image_id));
CREATE TABLE IF NOT EXISTS doubts(
    version TEXT NOT NULL, image_id TEXT NOT NULL, label TEXT NOT NULL, at REAL NOT NULL,
    dice TEXT NOT NULL, suspicion REAL NOT NULL, PRIMARY KEY(version, image_id));
"""


@dataclass(frozen=True)
class CaseScoreRecord:
    """The scores of a case by one version.

    Attributes:
        scores: embedding, and the scores if they have been computed.
        scored: whether scoring is finished; true also for unreadable images, which would otherwise be retried for ever.
        problem: why there are no scores.
        elsewhere: whether the only problem is that the image fits another served preset better.
    """

    scores: CaseScores
    scored: bool
    problem: str = ""
    elsewhere: bool = False


@dataclass(frozen=True)
class LabelDisagreement:
    """The disagreement between a version's prediction and a case's label.

    Attributes:
        image_id: id of the case.
        label: the label's SHA-256 or stamp, which identifies the version of the label.
        dice: Dice of each label that either mask has; empty for a label that cannot be compared.
        suspicion: from 0 (agreement) to 1.
    """

    image_id: str
    label: str
    dice: Mapping[str, float]
    suspicion: float


@dataclass
class _Version:
    """The rows of a version that have been read."""

    last: int = 0
    records: dict[str, CaseScoreRecord] = field(default_factory=dict)


class ScoreStore:
    """The scores of one preset's cases.

    A damaged file is renamed and replaced, since its content can be computed again.

    Args:
        folder: ``model/<preset>``.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / SCORES_FILE
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._known: dict[str, _Version] = {}

    def score_records(self, version: str) -> Mapping[str, CaseScoreRecord]:
        """A version's scores so far, by image."""
        with self._lock:
            known = self._known.setdefault(version, _Version())
            query = "SELECT * FROM looks WHERE version = ? AND sequence > ? ORDER BY sequence"
            for row in self._open().execute(query, (version, known.last)):
                known.records[row["image_id"]] = _score_image(row)
                known.last = row["sequence"]
            return dict(known.records)

    def latest(self) -> str | None:
        """The version with the most recent scores."""
        with self._lock:
            row = self._open().execute("SELECT version FROM looks ORDER BY sequence DESC LIMIT 1").fetchone()
            return row["version"] if row else None

    def keep(self, version: str, image_id: str, record: CaseScoreRecord) -> None:
        """Store a version's scores of a case, replacing earlier ones."""
        case_scores = record.scores
        embedding = None if case_scores.embedding is None else case_scores.embedding.astype(np.float32).tobytes()
        scores = json.dumps(dict(case_scores.values)) if record.scored else None
        foreground = None if math.isnan(case_scores.foreground_voxels) else case_scores.foreground_voxels
        row = (version, image_id, time.time(), scores, foreground, embedding, record.problem or None)
        with self._lock, self._open() as db:
            columns = "version, image_id, at, scores, foreground, embedding, problem, elsewhere"
            values = (*row, record.elsewhere)
            db.execute(f"INSERT OR REPLACE INTO looks({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)

    def disagreements(self, version: str) -> dict[str, LabelDisagreement]:
        """A version's disagreements with labels, by image."""
        with self._lock:
            rows = self._open().execute("SELECT * FROM doubts WHERE version = ?", (version,)).fetchall()
        return {
            r["image_id"]: LabelDisagreement(r["image_id"], r["label"], json.loads(r["dice"]), r["suspicion"])
            for r in rows
        }

    def keep_disagreement(self, version: str, disagreement: LabelDisagreement) -> None:
        """Store a version's disagreement with a label, replacing an earlier one."""
        row = (
            version,
            disagreement.image_id,
            disagreement.label,
            time.time(),
            json.dumps(dict(disagreement.dice)),
            disagreement.suspicion,
        )
        with self._lock, self._open() as db:
            db.execute("INSERT OR REPLACE INTO doubts VALUES (?, ?, ?, ?, ?, ?)", row)

    def forget(self, image_id: str) -> None:
        """Delete the scores of a case by all versions, so that it is scored again."""
        with self._lock, self._open() as db:
            db.execute("DELETE FROM looks WHERE image_id = ?", (image_id,))
            for known in self._known.values():
                known.records.pop(image_id, None)

    def prune(self, keep: int) -> None:
        """Delete the scores of all versions except the most recent ones.

        Args:
            keep: number of versions to keep.
        """
        query = "SELECT version FROM looks GROUP BY version ORDER BY MAX(sequence) DESC LIMIT ?"
        with self._lock, self._open() as db:
            kept = [row["version"] for row in db.execute(query, (keep,))]
            for table in ("looks", "doubts"):
                db.execute(f"DELETE FROM {table} WHERE version NOT IN ({', '.join('?' * len(kept))})", kept)
            self._known = {version: known for version, known in self._known.items() if version in kept}

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._db is not None:
                self._db.close()
                self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._db, repaired = open_database(self._path, SCHEMA, isolation_level="DEFERRED")
            add_column(self._db, "looks", "elsewhere", "INTEGER NOT NULL DEFAULT 0")
            if repaired:
                logger.warning("%s", repaired)
        return self._db


def _score_image(row: sqlite3.Row) -> CaseScoreRecord:
    values = json.loads(row["scores"]) if row["scores"] else {}
    embedding: FloatArray | None = None
    if row["embedding"] is not None:
        embedding = np.frombuffer(row["embedding"], dtype=np.float32)
    foreground = math.nan if row["foreground"] is None else float(row["foreground"])
    done = row["scores"] is not None or row["problem"] is not None
    return CaseScoreRecord(
        CaseScores(values, foreground, embedding), done, row["problem"] or "", bool(row["elsewhere"])
    )
