"""An index of the DICOM files in a folder: kept in SQLite, filled in the background, read by many threads.

Each thread has a connection of its own, and readers do not wait for the writer (SQLite's write-ahead log). A file is
read again when its size or its time of change differs, so that the next start is quick.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom import dcmread
from pydicom.errors import InvalidDicomError

from lib.dicom.attributes import Json, element, first_value, summarize, to_json
from lib.dicom.series import DECODING_ERRORS, describe, is_dicom

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SCANS = 2.0
FILES_A_TRANSACTION = 50
TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sop TEXT, problem TEXT);
CREATE TABLE IF NOT EXISTS instances (
    sop TEXT PRIMARY KEY, study TEXT NOT NULL, series TEXT NOT NULL, path TEXT NOT NULL, syntax TEXT NOT NULL,
    number INTEGER NOT NULL, summary TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_series ON instances (study, series, number);
CREATE INDEX IF NOT EXISTS by_series_alone ON instances (series);
CREATE INDEX IF NOT EXISTS by_path ON instances (path);
"""


@dataclass(frozen=True)
class Instance:
    """One indexed file."""

    sop: str
    study: str
    series: str
    file: Path
    syntax: str


@dataclass(frozen=True)
class SeriesEntry:
    """What is known of a series: its UIDs, the summary of its first instance, and how many there are."""

    study: str
    series: str
    summary: Json
    instances: int
    frames: int

    @property
    def modality(self) -> str:
        """CT, MR, SEG ..."""
        return first_value(self.summary, "Modality")


@dataclass
class Progress:
    """How far the index is."""

    found: int = 0
    indexed: int = 0
    scans: int = 0
    problems: dict[str, str] = field(default_factory=dict)


class DicomIndex:
    """The index of one folder.

    Args:
        folder: with DICOM files anywhere below it; other files are passed over.
        database: file of the index, made when it is missing and made anew when it is damaged.
        skipped: names of folders, anywhere below, that are not looked into.
    """

    def __init__(self, folder: Path, database: Path, skipped: Iterable[str] = ()) -> None:
        self.folder = folder
        self.progress = Progress()
        self._database = database
        self._skipped = frozenset(skipped)
        self._local = threading.local()
        self._writing = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._series: dict[str, SeriesEntry] | None = None
        database.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection.executescript(TABLES)
        except sqlite3.DatabaseError:
            logger.warning("the index %s is damaged and made anew", database.name)
            for suffix in ("", "-wal", "-shm"):
                database.with_name(database.name + suffix).unlink(missing_ok=True)
            self._connection.executescript(TABLES)

    def start(self) -> None:
        """Scan now and again in the background, until ``stop``."""
        self._thread = threading.Thread(target=self._keep_scanning, name="dicom-index", daemon=True)
        self._thread.start()

    @property
    def is_started(self) -> bool:
        """Whether it is kept up to date in the background."""
        return self._thread is not None

    def stop(self) -> None:
        """End the background scan."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def scan(self) -> None:
        """Take in what is new or changed below the folder, and forget what is gone."""
        known = dict(self._connection.execute("SELECT path, stamp FROM files"))
        found = dict(self._walk())
        gone = [path for path in known if path not in found]
        changed = [path for path, stamp in found.items() if known.get(path) != stamp]
        self.progress.found, self.progress.indexed = len(found), len(found) - len(changed)
        self._remove(gone)
        for start in range(0, len(changed), FILES_A_TRANSACTION):
            if self._stopped.is_set():
                return
            part = changed[start : start + FILES_A_TRANSACTION]
            self._take_in([(path, found[path]) for path in part])
            self.progress.indexed += len(part)
        self.progress.problems = dict(
            self._connection.execute("SELECT path, problem FROM files WHERE problem IS NOT NULL")
        )
        self.progress.scans += 1

    def add(self, file: Path) -> None:
        """Take in one file at once."""
        self._take_in([(str(file), _stamp(file.stat()))])

    def remove(self, file: Path) -> None:
        """Forget one file at once."""
        self._remove([str(file)])

    def series(self) -> dict[str, SeriesEntry]:
        """All series by their UID."""
        entries = self._series
        if entries is None:
            entries = {entry.series: entry for entry in self._read_series()}
            self._series = entries
        return entries

    def instances(self, study: str = "", series: str = "") -> list[Instance]:
        """Instances of a study or a series, in the order of their numbers."""
        where, values = _where(study, series)
        rows = self._connection.execute(
            f"SELECT sop, study, series, path, syntax FROM instances {where} ORDER BY series, number, sop", values
        )
        return [
            Instance(sop, of_study, of_series, Path(path), syntax) for sop, of_study, of_series, path, syntax in rows
        ]

    def stamp(self, series: str) -> str:
        """Of a series' files: another one when any is added, changed or gone."""
        rows = self._connection.execute(
            "SELECT path, stamp FROM files JOIN instances USING (path) WHERE series = ? ORDER BY path", (series,)
        )
        return hashlib.sha256(repr(rows.fetchall()).encode()).hexdigest()[:16]

    def instance(self, sop: str) -> Instance | None:
        """One instance."""
        row = self._connection.execute(
            "SELECT sop, study, series, path, syntax FROM instances WHERE sop = ?", (sop,)
        ).fetchone()
        return Instance(row[0], row[1], row[2], Path(row[3]), row[4]) if row else None

    def metadata(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[Json]:
        """DICOM JSON of the instances of a study, a series, or one instance."""
        where, values = _where(study, series, sop)
        column = "summary" if summary else "metadata"
        rows = self._connection.execute(f"SELECT {column} FROM instances {where} ORDER BY series, number, sop", values)
        return [json.loads(text) for (text,) in rows]

    def _keep_scanning(self) -> None:
        while not self._stopped.is_set():
            try:
                self.scan()
            except (OSError, sqlite3.Error):  # a share that is away for a while, say: the next scan may see it again
                logger.exception("the folder of studies could not be scanned")
            self._stopped.wait(SECONDS_BETWEEN_SCANS)

    def _walk(self) -> Iterator[tuple[str, str]]:
        """Path and stamp of every file that may be DICOM, as its name says."""
        for folder, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if name not in self._skipped and not name.startswith(".")]
            for name in files:
                if name.startswith(".") or name.endswith(OTHER_SUFFIXES):
                    continue
                path = os.path.join(folder, name)
                try:
                    yield path, _stamp(os.stat(path))
                except OSError:  # gone meanwhile
                    continue

    def _take_in(self, files: list[tuple[str, str]]) -> None:
        read = [(path, stamp, *_read(Path(path))) for path, stamp in files]
        with self._writing, self._connection as connection:
            for path, stamp, row, problem in read:
                connection.execute("DELETE FROM instances WHERE path = ?", (path,))
                sop = row[0] if row else None
                connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", (path, stamp, sop, problem))
                if row:
                    connection.execute(
                        "INSERT OR REPLACE INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row[:3], path, *row[3:])
                    )
        if any(row for _, _, row, _ in read):
            self._series = None

    def _remove(self, paths: list[str]) -> None:
        if not paths:
            return
        with self._writing, self._connection as connection:
            # another file of the same instance is read again, in place of this one
            again = "DELETE FROM files WHERE sop IN (SELECT sop FROM instances WHERE path = ?)"
            connection.executemany(again, [(path,) for path in paths])
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])
            connection.executemany("DELETE FROM instances WHERE path = ?", [(path,) for path in paths])
        self._series = None

    def _read_series(self) -> Iterator[SeriesEntry]:
        rows = self._connection.execute(
            "SELECT study, series, COUNT(*), summary, SUM(MAX(1, COALESCE(json_extract(summary, ?), 1))) "
            "FROM (SELECT * FROM instances ORDER BY study, series, number, sop) GROUP BY study, series",
            ('$."00280008".Value[0]',),
        )
        for study, series, instances, summary, frames in rows:
            yield SeriesEntry(study, series, json.loads(summary), instances, int(frames))

    @property
    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._database, timeout=60)
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")  # a lost index is made again
            except sqlite3.DatabaseError:
                connection.close()
                raise
            self._local.connection = connection
        return connection


OTHER_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".json", ".txt", ".csv", ".db", ".lock", ".zip")
"""Names of files that are no DICOM, and are not even opened."""


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _where(study: str, series: str, sop: str = "") -> tuple[str, list[str]]:
    given = [(column, value) for column, value in (("study", study), ("series", series), ("sop", sop)) if value]
    conditions = " AND ".join(f"{column} = ?" for column, _ in given)
    return (f"WHERE {conditions}" if given else ""), [value for _, value in given]


def _read(file: Path) -> tuple[tuple[Any, ...] | None, str | None]:
    """A row of the table of instances, or what is wrong with a DICOM file; neither for a file of another kind."""
    if not is_dicom(file):
        return None, None
    try:
        header = dcmread(file, stop_before_pixels=True)
        metadata = to_json(header)
        uids = [str(header.get(keyword, "")) for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")]
        syntax = str(header.file_meta.TransferSyntaxUID)
        number = int(header.get("InstanceNumber") or 0)
    except (InvalidDicomError, *DECODING_ERRORS) as error:
        return None, f"cannot be read: {describe(error)}"
    if not all(uids):
        return None, f"instance {uids[0]} has no Study, Series or SOP Instance UID"
    return (*uids, syntax, number, json.dumps(summarize(metadata)), json.dumps(metadata)), None


def counts(entries: Iterable[SeriesEntry]) -> Json:
    """What a study's entry says of its series."""
    listed = list(entries)
    modalities = sorted({entry.modality for entry in listed if entry.modality})
    return {
        **element("ModalitiesInStudy", *modalities),
        **element("NumberOfStudyRelatedSeries", len(listed)),
        **element("NumberOfStudyRelatedInstances", sum(entry.instances for entry in listed)),
    }


def by_study(entries: Mapping[str, SeriesEntry]) -> dict[str, list[SeriesEntry]]:
    """Series grouped by study."""
    grouped: dict[str, list[SeriesEntry]] = {}
    for entry in entries.values():
        grouped.setdefault(entry.study, []).append(entry)
    return grouped
