"""An index of the DICOM files in a folder: kept in SQLite, filled in the background, read by many threads.

Each thread has a connection of its own, and readers do not wait for the writer (SQLite's write-ahead log). A file is
read again when its size or its time of change differs, so that the next start is quick. Several processes may keep one
index: a server, its trainings, and other servers on the same folder. The database counts its changes, and each process
reads the list of series again when the count differs.

Each file has a row. Of several files with the same Study, Series and SOP Instance UID the one that was indexed first is
the instance; the others are copies, or problems where their attributes differ. Of several studies with a series of the
same UID, the one that was indexed first keeps it; the series of another one gets a UID of its own, in all that is told.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lib.dicom.attributes import Json, dump, element, first_value, summarize, tag_of, to_json
from lib.dicom.files import MEDIA_DIRECTORY, check_levels, is_dicom, is_uid, read_instance, reading
from lib.dicom.presented.instances import uid_of
from lib.dicom.presented.regular import MODALITIES, Regular, regular_for
from lib.errors import ImageError, NotFoundError
from lib.storage.admission import Admission
from lib.storage.json_files import is_unicode
from lib.storage.sqlite import connect, remove_side_files

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_SCANS = 2.0
SECONDS_BETWEEN_COUNTS = 0.25
"""How often the database is asked whether another process has changed it; own changes are seen at once."""
FILES_A_TRANSACTION = 50
VERSION = 5
"""Of the tables and of what is in them; an index of another version is made anew."""
TABLES = """
DROP VIEW IF EXISTS shown;
DROP TABLE IF EXISTS files;
DROP TABLE IF EXISTS rows;
DROP TABLE IF EXISTS instances;
DROP TABLE IF EXISTS regular;
CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, problem TEXT);
CREATE TABLE rows (
    id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, sop TEXT NOT NULL, study TEXT NOT NULL, series TEXT NOT NULL,
    in_file TEXT NOT NULL, syntax TEXT NOT NULL, number INTEGER NOT NULL, is_placed INTEGER NOT NULL,
    summary TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE TABLE regular (
    study TEXT NOT NULL, series TEXT NOT NULL, stamp TEXT NOT NULL, slices INTEGER NOT NULL, why TEXT NOT NULL,
    PRIMARY KEY (study, series)
);
-- kept when the index is made anew, and when a study is gone: its labels do not become another study's
CREATE TABLE IF NOT EXISTS claims (series TEXT PRIMARY KEY, study TEXT NOT NULL);
CREATE INDEX by_uids ON rows (study, series, sop, id);
CREATE INDEX by_series ON rows (series);
CREATE INDEX by_sop ON rows (sop);
CREATE VIEW shown AS SELECT * FROM rows AS own WHERE NOT EXISTS (
    SELECT 1 FROM rows AS other WHERE (other.study, other.series, other.sop) = (own.study, own.series, own.sop)
    AND other.id < own.id
);
"""
DIFFERING_COPIES = """
SELECT own.path, own.sop, (SELECT path FROM shown WHERE (study, series, sop) = (own.study, own.series, own.sop))
FROM rows AS own WHERE EXISTS (
    SELECT 1 FROM shown AS first WHERE (first.study, first.series, first.sop) = (own.study, own.series, own.sop)
    AND first.id < own.id AND first.metadata != own.metadata
)
"""
RENAMED_SERIES = """
SELECT MIN(path), rows.series, in_file, claims.study, rows.study FROM rows JOIN claims ON in_file = claims.series
WHERE rows.series != in_file GROUP BY rows.study, rows.series
"""
FIRST_WITH_TWO_STUDIES = 2
"""The version that kept series of one UID in two studies, and had no claims yet."""
CLAIMS_OF_ROWS = """
CREATE TABLE IF NOT EXISTS claims (series TEXT PRIMARY KEY, study TEXT NOT NULL);
INSERT OR IGNORE INTO claims SELECT series, study FROM rows ORDER BY id;
"""
UPSERT = """
INSERT INTO rows (path, sop, study, series, in_file, syntax, number, is_placed, summary, metadata)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET sop = excluded.sop, study = excluded.study, series = excluded.series,
    in_file = excluded.in_file, syntax = excluded.syntax, number = excluded.number, is_placed = excluded.is_placed,
    summary = excluded.summary, metadata = excluded.metadata
"""
CHANGES_TABLE = """
CREATE TABLE IF NOT EXISTS changes (files INTEGER NOT NULL, regular INTEGER NOT NULL);
INSERT INTO changes SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM changes);
"""
"""How often the rows of files and of regular series were changed, by whichever process."""
WITHOUT_CHANGES = 4
"""The version that did not count them yet."""
LARGEST_NUMBER = 1_000_000_000
DICOM_SUFFIXES = (".dcm", ".ima", ".dicom")
"""Names of files that say to be DICOM: one that is not is a problem."""


@dataclass(frozen=True)
class Instance:
    """One indexed file.

    Attributes:
        is_renamed: whether the file has another Series Instance UID.
    """

    sop: str
    study: str
    series: str
    file: Path
    syntax: str
    is_renamed: bool = False


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


@dataclass(frozen=True)
class _Listing:
    """The series at one state of the database.

    Attributes:
        counts: how often files and regular series had been changed.
        own_changes: how many changes this process had made.
        counted_at: seconds of the clock at which ``counts`` was last compared with the database's.
    """

    counts: tuple[int, int]
    own_changes: int
    counted_at: float
    entries: list[SeriesEntry]
    by_uid: dict[str, SeriesEntry]
    regular: dict[str, Regular]


@dataclass
class Progress:
    """How far the index is."""

    files: int = 0
    indexed: int = 0
    scans: int = 0
    failure: str = ""
    """Why the last scan ended early; "" where it did not."""
    problems: dict[str, str] = field(default_factory=dict)
    """What is wrong with a file, by its path below the folder."""


class DicomIndex:
    """The index of one folder.

    Args:
        folder: with DICOM files anywhere below it; other files are passed over.
        database: file of the index, made when it is missing and made anew when it is damaged.
        skipped: names of folders, anywhere below, that are not looked into.
        admission: judges which files are the folder's own.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        database: Path,
        skipped: Iterable[str] = (),
        admission: Admission | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.progress = Progress()
        self._database = database
        self._skipped = frozenset(skipped)
        self._admission = admission or Admission(folder)
        self._local = threading.local()
        self._clock = clock
        self._writing, self._listing_lock = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._own_changes = 0
        self._judged = -1
        self._unnamed: list[str] = []
        self._listing: _Listing | None = None
        database.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._make_tables()
        except sqlite3.DatabaseError:
            logger.warning("the index %s is damaged and made anew", database.name)
            database.unlink(missing_ok=True)
            remove_side_files(database)
            self._make_tables()

    def start(self) -> None:
        """Scan now and again in the background, until ``stop``."""
        self._thread = threading.Thread(target=self._keep_scanning, name="dicom-index", daemon=True)
        self._thread.start()

    @property
    def is_started(self) -> bool:
        """Whether it is kept up to date in the background."""
        return self._thread is not None

    def failure(self) -> str:
        """Why the index is not kept up to date, in a sentence; "" when it is."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopped.is_set():
            return "the index of the DICOM files is no longer kept up to date: its thread has ended"
        return f"the DICOM files cannot be indexed: {self.progress.failure}" if self.progress.failure else ""

    def stop(self) -> None:
        """End the background scan."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()

    def scan(self) -> None:
        """Take in what is new or changed below the folder, and forget what is gone."""
        known = dict(self._connection.execute("SELECT path, stamp FROM files"))
        stamps = dict(self._walk())
        unnamed = [path for path in stamps if not is_unicode(path)]
        if unnamed != self._unnamed:
            self._unnamed, self._judged = unnamed, -1
        for path in unnamed:
            del stamps[path]
        gone = [path for path in known if path not in stamps]
        changed = [path for path, stamp in stamps.items() if known.get(path) != stamp]
        self.progress.files, self.progress.indexed = len(stamps), len(stamps) - len(changed)
        self._remove(gone)
        for start in range(0, len(changed), FILES_A_TRANSACTION):
            if self._stopped.is_set():
                return
            part = changed[start : start + FILES_A_TRANSACTION]
            self._take_in([(path, stamps[path]) for path in part])
            self.progress.indexed += len(part)
        files, _ = self._counts()
        if self._judged != files:
            self.progress.problems = {self._below(path): problem for path, problem in self._problems()}
            self._judge_regular()
            self._judged = files
        self.progress.scans += 1

    def add(self, file: Path) -> None:
        """Take in one file at once."""
        self._take_in([(str(file), _stamp(file.stat()))])

    def remove(self, file: Path) -> None:
        """Forget one file at once."""
        self._remove([str(file)])

    def entries(self) -> list[SeriesEntry]:
        """The series of all studies, in the order in which they were indexed."""
        return self._listed().entries

    def series(self) -> dict[str, SeriesEntry]:
        """The series by their UID."""
        return self._listed().by_uid

    def name_in(self, study: str, series_in_file: str) -> str:
        """The UID under which a study's series is told, by the one in its files; that one where there is none."""
        row = self._connection.execute(
            "SELECT series FROM rows WHERE study = ? AND in_file = ? LIMIT 1", (study, series_in_file)
        ).fetchone()
        return row[0] if row else series_in_file

    def regular(self) -> dict[str, Regular]:
        """What is to be shown beside the series that viewers cannot show, by their UID."""
        return self._listed().regular

    def instances(self, study: str = "", series: str = "", sop: str = "") -> list[Instance]:
        """Instances of a study or a series, or with a UID, in the order of their numbers."""
        where, values = _where(study, series, sop)
        rows = self._connection.execute(
            f"SELECT {INSTANCE} FROM shown {where} ORDER BY series, number, sop, id", values
        )
        return [_instance(row) for row in rows]

    def stamp(self, series: str, study: str = "") -> str:
        """A hash of a series' files with their sizes and times; it changes when one is added, changed or removed."""
        where, values = _where(study, series)
        rows = self._connection.execute(
            f"SELECT path, stamp FROM files JOIN shown USING (path) {where} ORDER BY path", values
        )
        return hashlib.sha256(repr(rows.fetchall()).encode()).hexdigest()[:16]

    def instance(self, sop: str, study: str = "", series: str = "") -> Instance | None:
        """One instance; of a UID that is in several series, the one that was indexed first."""
        where, values = _where(study, series, sop)
        row = self._connection.execute(f"SELECT {INSTANCE} FROM shown {where} ORDER BY id", values).fetchone()
        return _instance(row) if row else None

    def first(self, study: str, series: str = "", sop: str = "") -> Json:
        """DICOM JSON of the first instance of a study, a series, or of one instance.

        Raises:
            NotFoundError: when there is none.
        """
        instances = self.metadata(study, series, sop)
        if not instances:
            raise NotFoundError("instance below", "/".join(filter(None, (study, series, sop))))
        return instances[0]

    def metadata(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[Json]:
        """DICOM JSON of the instances of a study, a series, or one instance."""
        return [json.loads(text) for text in self.metadata_texts(study, series, sop, summary)]

    def metadata_texts(self, study: str = "", series: str = "", sop: str = "", summary: bool = False) -> list[str]:
        """The same as it is kept, as JSON."""
        where, values = _where(study, series, sop)
        column = "summary" if summary else "metadata"
        order = "series, number, sop, id"
        rows = self._connection.execute(f"SELECT {column} FROM shown {where} ORDER BY {order}", values)
        return [text for (text,) in rows]

    def _keep_scanning(self) -> None:
        while not self._stopped.is_set():
            # whatever happens, the next scan may go well: a share is back, a disk has room again
            try:
                self.scan()
                self.progress.failure = ""
            except Exception as error:
                logger.exception("the folder of studies could not be scanned")
                self.progress.failure = str(error) or type(error).__name__
            self._stopped.wait(SECONDS_BETWEEN_SCANS)

    def _walk(self) -> Iterator[tuple[str, str]]:
        """Path and stamp of every regular file that may be DICOM, as its name says, in the order of the paths."""
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if name not in self._skipped and not name.startswith("."))
            for name in sorted(files):
                if name.startswith(".") or name.lower().endswith(OTHER_SUFFIXES):
                    continue
                path = os.path.join(folder, name)
                if self._admission.refusal_of_place(Path(path)) is not None:  # not even opened
                    continue
                try:
                    status = os.stat(path)
                except OSError:  # gone meanwhile
                    continue
                if stat.S_ISREG(status.st_mode):  # a pipe has no end
                    yield path, _stamp(status)

    def _take_in(self, files: list[tuple[str, str]]) -> None:
        read = [(path, stamp, *_read(Path(path))) for path, stamp in files]
        with self._writing, self._changing("files") as connection:
            for path, stamp, row, problem in read:
                connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (path, stamp, problem))
                if row:
                    connection.execute(UPSERT, (path, *self._named(connection, row)))
                else:
                    connection.execute("DELETE FROM rows WHERE path = ?", (path,))

    @staticmethod
    def _named(connection: sqlite3.Connection, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """A row with the UID under which its series is told, before the one in its file."""
        sop, study, series, *others, summary, metadata = row
        connection.execute("INSERT OR IGNORE INTO claims VALUES (?, ?)", (series, study))
        (owner,) = connection.execute("SELECT study FROM claims WHERE series = ?", (series,)).fetchone()
        if owner == study:
            return sop, study, series, series, *others, summary, metadata
        own = uid_of(f"{study}/{series}", "series of a second study")
        renamed = (dump(json.loads(text) | element("SeriesInstanceUID", own)).decode() for text in (summary, metadata))
        return sop, study, own, series, *others, *renamed

    def _judge_regular(self) -> None:
        """See which series viewers cannot show, of those whose files have changed."""
        rows = self._connection.execute(
            "SELECT study, series, path, stamp FROM files JOIN shown USING (path) ORDER BY study, series, path"
        )
        stamps = {
            uids: hashlib.sha256(repr([row[2:] for row in group]).encode()).hexdigest()[:16]
            for uids, group in itertools.groupby(rows, key=lambda row: (row[0], row[1]))
        }
        known = {
            (study, series): stamp
            for study, series, stamp in self._connection.execute("SELECT study, series, stamp FROM regular")
        }
        images = {(e.study, e.series): e for e in self.entries() if e.modality in MODALITIES and e.frames > 1}
        wanted = {uids: stamp for uids, stamp in stamps.items() if uids in images}
        judged = []
        for (study, series), stamp in wanted.items():
            if known.get((study, series)) != stamp and not self._stopped.is_set():
                regular = regular_for(self.metadata(study, series), images[study, series].summary)
                judged.append((study, series, stamp, *((regular.slices, regular.why) if regular else (0, ""))))
        gone = [uids for uids in known if uids not in wanted]
        if not gone and not judged:
            return
        with self._writing, self._changing("regular") as connection:
            connection.executemany("DELETE FROM regular WHERE study = ? AND series = ?", gone)
            connection.executemany("INSERT OR REPLACE INTO regular VALUES (?, ?, ?, ?, ?)", judged)

    def _remove(self, paths: list[str]) -> None:
        if not paths:
            return
        with self._writing, self._changing("files") as connection:
            connection.executemany("DELETE FROM files WHERE path = ?", [(path,) for path in paths])
            connection.executemany("DELETE FROM rows WHERE path = ?", [(path,) for path in paths])

    def _listed(self) -> _Listing:
        """The series as the database has them, read again only after a change."""
        listing = self._listing
        if listing is not None and self._is_current(listing):
            return listing
        with self._listing_lock:
            listing = self._listing
            if listing is not None and self._is_current(listing):  # another thread was faster
                return listing
            # the number of own changes is read first: a change in between is then seen by the next call
            own_changes, now = self._own_changes, self._clock()
            connection = self._connection
            connection.execute("BEGIN")  # one state of the database for all that is read
            try:
                counts = self._counts()
                if listing is not None and listing.counts == counts:
                    listing = replace(listing, own_changes=own_changes, counted_at=now)
                else:
                    entries = self._read_series()
                    by_uid = {entry.series: entry for entry in reversed(entries)}
                    rows = connection.execute("SELECT series, slices, why FROM regular WHERE slices > 0")
                    regular = {series: Regular(slices, why) for series, slices, why in rows}
                    listing = _Listing(counts, own_changes, now, entries, by_uid, regular)
            finally:
                connection.rollback()
            self._listing = listing
            return listing

    def _is_current(self, listing: _Listing) -> bool:
        age = self._clock() - listing.counted_at
        return listing.own_changes == self._own_changes and age < SECONDS_BETWEEN_COUNTS

    def _counts(self) -> tuple[int, int]:
        """How often files and regular series were changed, by whichever process."""
        files, regular = self._connection.execute("SELECT files, regular FROM changes").fetchone()
        return files, regular

    @contextmanager
    def _changing(self, what: Literal["files", "regular"]) -> Iterator[sqlite3.Connection]:
        """A transaction that counts as a change; the caller holds the lock of writers."""
        with self._connection as connection:
            yield connection
            connection.execute(f"UPDATE changes SET {what} = {what} + 1")
        self._own_changes += 1

    def _read_series(self) -> list[SeriesEntry]:
        """All series, each described by its first instance with an Image Position (Patient).

        Others in the series, such as screenshots, may have another modality.
        """
        first = self._connection.execute("SELECT study, series FROM rows GROUP BY study, series ORDER BY MIN(id)")
        order = {uids: number for number, uids in enumerate(first)}
        # SQLite takes the columns beside MIN from the row that has the minimum
        rows = self._connection.execute(
            "SELECT study, series, COUNT(*), summary, SUM(MAX(1, CAST(COALESCE(json_extract(summary, ?), 1) AS INT))), "
            "MIN(number + 10000000000 * (1 - is_placed)) FROM shown GROUP BY study, series",
            (f'$."{tag_of("NumberOfFrames")}".Value[0]',),
        )
        entries = [
            SeriesEntry(study, series, json.loads(summary), instances, int(frames))
            for study, series, instances, summary, frames, _ in rows
        ]
        return sorted(entries, key=lambda entry: order.get((entry.study, entry.series), len(order)))

    def _problems(self) -> Iterator[tuple[str, str]]:
        """Files that cannot be read, files that differ from the instance of their UIDs, and series in two studies."""
        yield from ((path, "its name is not UTF-8, so that nobody can ask for it") for path in self._unnamed)
        yield from self._connection.execute("SELECT path, problem FROM files WHERE problem IS NOT NULL")
        for path, sop, first in self._connection.execute(DIFFERING_COPIES):
            yield path, f"left out: instance {sop} is in {self._below(first)} too, with other attributes"
        for path, series, in_file, first_study, study in self._connection.execute(RENAMED_SERIES):
            yield (
                path,
                f"series {in_file} is that of study {first_study}, which was indexed first, and an image is named by "
                f"this UID alone: that of study {study} is shown, segmented and labelled as series {series}",
            )

    def _below(self, path: str) -> str:
        """A path as it is told to clients."""
        below = os.path.relpath(path, self.folder)
        return below.encode(errors="backslashreplace").decode()

    def _make_tables(self) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version == FIRST_WITH_TWO_STUDIES:
            self._connection.executescript(CLAIMS_OF_ROWS)
        if version != VERSION:
            tables = CHANGES_TABLE if version == WITHOUT_CHANGES else TABLES + CHANGES_TABLE
            self._connection.executescript(f"BEGIN IMMEDIATE; {tables} PRAGMA user_version = {VERSION}; COMMIT;")

    @property
    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = connect(self._database, timeout_seconds=60, one_thread=True)
            self._local.connection = connection
        return connection


OTHER_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd", ".json", ".txt", ".csv", ".db", ".lock", ".zip")
"""Names of files that are no DICOM, and are not even opened."""


INSTANCE = "sop, study, series, path, syntax, series != in_file"
"""Columns of :class:`Instance`."""


def _instance(row: tuple[str, str, str, str, str, int]) -> Instance:
    sop, study, series, path, syntax, is_renamed = row
    return Instance(sop, study, series, Path(path), syntax, bool(is_renamed))


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}"


def _where(study: str, series: str, sop: str = "") -> tuple[str, list[str]]:
    given = [(column, value) for column, value in (("study", study), ("series", series), ("sop", sop)) if value]
    conditions = " AND ".join(f"{column} = ?" for column, _ in given)
    return (f"WHERE {conditions}" if given else ""), [value for _, value in given]


def _read(file: Path) -> tuple[tuple[Any, ...] | None, str | None]:
    """A row of the table without the path, or what is wrong with a DICOM file; neither for a file of another kind."""
    if not is_dicom(file):
        says_so = file.name.lower().endswith(DICOM_SUFFIXES)
        return None, "is no DICOM file, though its name says so" if says_so else None
    try:
        with reading("cannot be read"):
            return _row(file)
    except ImageError as error:
        return None, str(error)


def _row(file: Path) -> tuple[tuple[Any, ...] | None, str | None]:
    """As ``_read``, of a file that begins as DICOM does.

    Raises:
        Exception: of whatever type pydicom raises for a damaged file.
    """
    header = read_instance(file, with_pixels=False)
    if str(header.file_meta.get("MediaStorageSOPClassUID", "")) == MEDIA_DIRECTORY:
        return None, None
    check_levels(header)
    metadata = to_json(header)
    uids = [str(header.get(keyword) or "") for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")]
    if not all(uids):
        return None, "has no Study, Series or SOP Instance UID"
    bad = [uid for uid in uids if not is_uid(uid)]
    if bad:
        return None, f"has the UID {bad[0][:70]!r}; valid: digits and dots, a digit first, at most 64"
    number = max(-LARGEST_NUMBER, min(LARGEST_NUMBER, int(header.get("InstanceNumber") or 0)))
    is_placed = int("ImagePositionPatient" in header or "PerFrameFunctionalGroupsSequence" in header)
    syntax = str(header.file_meta.TransferSyntaxUID)
    return (*uids, syntax, number, is_placed, dump(summarize(metadata)).decode(), dump(metadata).decode()), None


def counts(entries: Iterable[SeriesEntry]) -> Json:
    """What a study's entry says of its series."""
    listed = list(entries)
    modalities = sorted({entry.modality for entry in listed if entry.modality})
    return {
        **element("ModalitiesInStudy", *modalities),
        **element("NumberOfStudyRelatedSeries", len(listed)),
        **element("NumberOfStudyRelatedInstances", sum(entry.instances for entry in listed)),
    }


def by_study(entries: Iterable[SeriesEntry]) -> dict[str, list[SeriesEntry]]:
    """Series grouped by study."""
    grouped: dict[str, list[SeriesEntry]] = {}
    for entry in entries:
        grouped.setdefault(entry.study, []).append(entry)
    return grouped
