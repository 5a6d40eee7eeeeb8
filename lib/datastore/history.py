"""The history of all submitted labels as immutable versions, and copies of the newest versions for other tools.

    history/versions/00000/00000042.final.case_7.nii.gz    the 42nd label of this store
    history/versions/00000/00000042.final.case_7.json      who, when, from which prediction, label map, SHA-256
    history/sent/00000/00000042.final.case_7.nrrd          the file as sent, if another file was made from it
    history/index.sqlite                                   an index of these files, rebuilt from them if it is lost
    labels/final/case_7.nii.gz                             a copy of the newest version, for MONAI Label and other tools

A version exists from the moment at which its label file has its final name; its JSON has been written before. Several
processes may write to one store: a lock file serialises them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock

from lib.datastore.index import VersionIndex
from lib.datastore.published import PublishedLabels
from lib.datastore.quarantine import Quarantine
from lib.datastore.records import (
    FINAL,
    INFERENCE,
    VERSIONS_A_FOLDER,
    LabelVersion,
    Submission,
    from_record,
    stem_for,
    suffix_of,
    to_record,
)
from lib.datastore.repair import repair, shorten
from lib.errors import ConflictError, NotFoundError, StorageError
from lib.storage.admission import Admission, is_what_was_kept
from lib.storage.files import (
    PARTIAL,
    Staged,
    read_blocks,
    sha256_of,
    stage,
    sync_everything,
    sync_folder,
)
from lib.storage.json_files import as_json
from lib.storage.sqlite import IN_MEMORY

logger = logging.getLogger("unetr.datastore")

SENT_FOLDER = "sent"
MOST_LATELY = 1000
SECONDS_BETWEEN_LOOKS = 0.005


class LabelHistory:
    """The versions of all labels of a store.

    Opening it repairs the traces of a crash, a full disk or manual changes; ``repairs`` describes the repairs. In a
    folder without write permission it can still be read.

    Args:
        folder: folder of the history; it is created if it does not exist.
        labels: folder of the copies of the newest versions, with one subfolder for each tag.
        adopts: whether files that replaced a published label are taken in as versions; False if the caller checks them
            first.
        admission: judges folders; without it, links out of the folder that holds the history are refused.
    """

    def __init__(self, folder: Path, labels: Path, adopts: bool = True, admission: Admission | None = None) -> None:
        self._adopts = adopts
        self.admission = admission or Admission(folder.parent)
        self.folder, self.versions_folder, self.sent_folder = folder, folder / "versions", folder / SENT_FOLDER
        self.quarantine = Quarantine(folder / "quarantine", admission=self.admission)
        self.repairs: list[str] = []
        self._publication_failures: frozenset[str] = frozenset()
        self._lately: deque[LabelVersion] = deque()
        self._lately_until, self._reading_lately = 0, threading.Lock()
        self._threads = threading.RLock()
        self._processes = FileLock(folder / ".lock", thread_local=False)
        self.read_only = not self._make_folders()
        if self.read_only:
            self._open(IN_MEMORY, labels)
        else:
            with self._alone():
                self._open(folder / "index.sqlite", labels)
        for sentence in self.repairs:
            logger.warning("label store: %s", sentence)

    # ------------------------------------------------------------------------------------------------ reading

    def latest(self, image_id: str, tag: str = FINAL) -> LabelVersion | None:
        """The newest version; None if there is none, or if the label was removed."""
        record = self.index.newest(image_id, tag)
        return None if record is None or record.get("removal") else self._version(record)

    def all_latest(self, tag: str = FINAL) -> list[LabelVersion]:
        """The newest version of each image that has one, in the order in which they were saved."""
        return [self._version(record) for record in self.index.all_newest(tag)]

    def versions(self, image_id: str, tag: str = FINAL) -> list[LabelVersion]:
        """All versions of an image's label, oldest first."""
        return [self._version(record) for record in self.index.of_image(image_id, tag)]

    def since(self, sequence: int) -> list[LabelVersion]:
        """All versions saved after that one, oldest first."""
        return [self._version(record) for record in self.index.since(sequence) if not record.get("removal")]

    def lately(self) -> list[LabelVersion]:
        """The versions among the newest thousand of the store, oldest first, without additional information of clients.

        Each is read once and cached, since pages request all of them whenever something has changed.
        """
        with self._reading_lately:
            last = self.index.last_sequence()
            for version in self.since(max(self._lately_until, last - MOST_LATELY)):
                self._lately.append(replace(version, info={}))
                last = max(last, version.sequence)
            while self._lately and self._lately[0].sequence <= last - MOST_LATELY:
                self._lately.popleft()
            self._lately_until = last
            return list(self._lately)

    def get(self, version_id: str) -> LabelVersion:
        """The version with this id.

        Raises:
            NotFoundError: if there is none with this id.
        """
        record = self.index.find(version_id)
        if record is None:
            raise NotFoundError("version", version_id[:200])
        return self._version(record)

    def is_kept(self, version: LabelVersion) -> bool:
        """Whether the file of a version's mask is unchanged, and not a link to another file."""
        return is_what_was_kept(version.file, self.folder, version.sha256)

    def mask(self, version: LabelVersion) -> Path:
        """The file of a version's mask.

        Raises:
            NotFoundError: if it does not exist, or is a link to another file.
        """
        return self._kept(version, version.file, version.sha256, "file of version")

    def sent(self, version: LabelVersion) -> Path:
        """The file as it was sent.

        Raises:
            NotFoundError: see :meth:`mask`.
        """
        if not version.sent_file:
            return self.mask(version)
        file = self.sent_folder / self.shard(version.sequence).name / version.sent_file
        return self._kept(version, file, version.sent_sha256, "sent file of version")

    # ------------------------------------------------------------------------------------------------ writing

    def append(self, file: Path, submission: Submission, sent: Path | None = None) -> LabelVersion:
        """Store and publish a label. After return, neither a crash nor a power failure can lose it.

        Args:
            file: file of the mask.
            submission: its description.
            sent: the original file, which is stored too; None if it is the mask's file itself.

        Raises:
            ConflictError: see :meth:`check_replaceable`.
            StorageError: if it cannot be stored; nothing has changed then.
        """
        with self._explained(f"label of {submission.image_id!r}"):
            self._check_writable(submission.tag)
            staged = stage(read_blocks(file), self.versions_folder)
            try:
                with self._alone():
                    if submission.source == INFERENCE:
                        self.check_replaceable(submission.image_id, submission.tag)
                    return self._append(staged, suffix_of(file), submission, sent)
            finally:
                staged.path.unlink(missing_ok=True)

    def check_replaceable(self, image_id: str, tag: str) -> None:
        """Refuse to replace a label drawn by a person with a model's mask.

        Raises:
            ConflictError: stating who drew it and when.
        """
        drawn = self.latest(image_id, tag)
        if drawn is not None and drawn.is_drawn:
            whose = f"by {drawn.user!r} " if drawn.user else ""
            raise ConflictError(
                f"the label {tag!r} of {image_id!r} was submitted {whose}at {drawn.saved_at}, and a model's mask does "
                "not replace it; valid: another tag, such as original"
            )

    def restore(self, version_id: str, user: str, client_id: str = "") -> LabelVersion:
        """Add a copy of an older version as the newest one; the versions between them are kept.

        Raises:
            NotFoundError: if there is none with this id.
            StorageError: see :meth:`append`; also if the file of the old version has changed.
        """
        old = self.get(version_id)
        if not old.file.is_file() or sha256_of(old.file) != old.sha256:
            raise StorageError(f"the file of version {version_id!r} is not what was saved, and is not restored")
        changes = {"user": user, "client_id": client_id, "source": "restore", "restored_from": version_id, "notes": ()}
        return self.append(old.file, Submission(**(_submission_fields(old) | changes)))

    def remove(self, image_id: str, tag: str, user: str = "") -> None:
        """Remove a label from ``labels/<tag>``; its versions are kept and can be restored.

        Raises:
            StorageError: if the removal cannot be stored.
        """
        with self._explained(f"removal of the label of {image_id!r}"):
            self._check_writable(tag)
            with self._alone():
                self._remove(Submission(image_id=image_id, tag=tag, user=user, source="removal"))

    def adopt(self, file: Path, submission: Submission, kept: Path | None = None) -> LabelVersion | None:
        """Take in a label file that was copied into ``labels/<tag>``; None if it is a version already.

        Args:
            file: the copied file.
            submission: its description.
            kept: the label in the form in which labels are stored, if that is another file.

        Raises:
            StorageError: see :meth:`append`.
        """
        if self._is_version(file, submission.image_id, submission.tag):
            self.publish_again(submission.image_id, submission.tag)
            return None
        return self.append(kept or file, submission, None if kept in (None, file) else file)

    def adopt_all(self, labels: Sequence[tuple[Path, Submission]]) -> list[LabelVersion]:
        """Take in many label files in ``labels/<tag>`` that have no version yet, as at the first start in a folder.

        They are synced to disk together, which is safe because the original files stay in place until then.

        Raises:
            StorageError: if they cannot be stored.
        """
        with self._explained(f"{len(labels)} labels of the folder"), self._alone():
            for tag in {submission.tag for _, submission in labels}:
                self._check_writable(tag)
            new = [(f, s) for f, s in labels if not self.published.is_ours(s.image_id, s.tag, f)]  # by another process
            if not new:
                return []
            first = self._next_sequence()
            versions = [self._copy_in(file, submission, first + n) for n, (file, submission) in enumerate(new)]
            sync_everything(self.versions_folder)
            with self.index.transaction():
                for version, (file, _) in zip(versions, new, strict=True):
                    self.index.insert(to_record(version))
                    self.published.note(version, file)
            return versions

    def publish_again(self, image_id: str, tag: str) -> None:
        """Copy the newest version to ``labels/<tag>`` again.

        Raises:
            StorageError: if it cannot be written.
        """
        with self._explained(f"label of {image_id!r}"), self._alone():
            version = self.latest(image_id, tag)
            if version is not None and not self.published.note_if_right(version):
                if not self.is_kept(version):
                    logger.error("label store: %s is not what was saved, and is not published", version.file.name)
                    return
                staged = self.published.stage(version, version.file)
                self.published.note(version, staged)
                self.published.put(version, staged)

    def put_right(self) -> list[str]:
        """Take in files in ``labels/<tag>`` that differ from the newest version; replace them if they are not new.

        A label that cannot be written there does not hold up the others; its versions are not changed.

        Returns:
            A sentence for each change, and for each label that cannot be written, once.
        """
        done, failures = [], []
        for image_id, tag in self.published.astray():
            version = self.latest(image_id, tag)
            if version is None or self.published.note_if_right(version):
                continue
            files = self.published.files(image_id, tag)
            if not self._adopts and not all(self._is_version(file, image_id, tag) for file in files):
                continue
            taken = [f for f in files if self.adopt(f, Submission(image_id=image_id, tag=tag, source="folder"))]
            if taken:
                done.append(f"{tag}/{taken[-1].name} was changed by somebody else, and taken in as a new version")
            else:
                try:
                    self.publish_again(image_id, tag)
                except StorageError as error:
                    failures.append(f"{tag}/{image_id}{version.suffix} is not the newest version: {error}")
                else:
                    done.append(f"{tag}/{image_id}{version.suffix} was not the newest version, and was written again")
        new_failures = [sentence for sentence in failures if sentence not in self._publication_failures]
        self._publication_failures = frozenset(failures)
        return shorten(done + new_failures)

    def keep_info(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Store additional information on an image (``tag`` empty) or on a label.

        Raises:
            StorageError: if it cannot be stored.
        """
        with self._explained(f"information about {image_id!r}"):
            self.index.keep_info(image_id, tag, info)

    def forget_infos(self, image_id: str, tags: Iterable[str]) -> None:
        """Forget what :meth:`keep_info` kept of an image that is removed, and of its labels.

        Raises:
            StorageError: when that cannot be written.
        """
        with self._explained(f"removal of image {image_id!r}"):
            for tag in ("", *tags):
                self.index.forget_info(image_id, tag)

    def close(self) -> None:
        """Close the index."""
        self.index.close()

    # ------------------------------------------------------------------------------------------------ inside

    def _kept(self, version: LabelVersion, file: Path, sha256: str, what: str) -> Path:
        if not is_what_was_kept(file, self.folder, sha256):
            if os.path.lexists(file):
                logger.error("label store: %s is not what was saved, and is not read", file.name)
            raise NotFoundError(what, version.version_id)
        return file

    def _append(self, staged: Staged, suffix: str, submission: Submission, sent: Path | None) -> LabelVersion:
        sequence = self._next_sequence()
        stem = self._stem(sequence, submission)
        file = stem.with_name(stem.name + suffix)
        version = _as_version(submission, sequence, file, staged.size, staged.sha256)
        side_car, copy, came = None, None, None
        try:
            if sent is not None:
                came, digest = self._keep_sent(sent, stem)
                version = replace(version, sent_file=came.name, sent_sha256=digest)
            copy = self.published.stage(version, staged.path)
            side_car = _write_side_car(stem, to_record(version))
            os.rename(staged.path, file)
            sync_folder(stem.parent)
            with self.index.transaction():
                self.index.insert(to_record(version))
                self.index.forget_info(version.image_id, version.tag)  # it described the previous version
                self.published.note(version, copy)
        except BaseException:
            for path in (file, side_car, copy, came):
                if path is not None:
                    path.unlink(missing_ok=True)
            raise
        self.published.put(version, copy)
        return version

    def _is_version(self, file: Path, image_id: str, tag: str) -> bool:
        """Whether a file is equal to the stored or the sent file of a version."""
        digest = sha256_of(file)
        return any(digest in (version.sha256, version.sent_sha256) for version in self.versions(image_id, tag))

    def _keep_sent(self, sent: Path, stem: Path) -> tuple[Path, str]:
        """Store a file as sent under its version's name; returns its path and its SHA-256."""
        folder = self.sent_folder / stem.parent.name
        self.admission.check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        staged = stage(read_blocks(sent), folder)
        path = folder / f"{stem.name}{suffix_of(sent)}"
        os.replace(staged.path, path)
        sync_folder(folder)
        return path, staged.sha256

    def _copy_in(self, file: Path, submission: Submission, sequence: int) -> LabelVersion:
        content = file.read_bytes()
        stem = self._stem(sequence, submission)
        target = stem.with_name(stem.name + suffix_of(file))
        digest = hashlib.sha256(content).hexdigest()
        version = _as_version(submission, sequence, target, len(content), digest)
        stem.with_name(stem.name + ".json").write_bytes(as_json(to_record(version)))
        part = stem.with_name(f".{os.getpid()}-{stem.name}{PARTIAL}")
        part.write_bytes(content)
        os.rename(part, target)
        return version

    def _remove(self, removal: Submission) -> None:
        sequence = self._next_sequence()
        record = to_record(_as_version(removal, sequence, Path("none"), 0, "")) | {"removal": True}
        _write_side_car(self._stem(sequence, removal), record)
        sync_folder(self.shard(sequence))
        with self.index.transaction():
            self.index.insert(record)
            self.index.forget_info(removal.image_id, removal.tag)
        self.published.take_away(removal.image_id, removal.tag)

    def _next_sequence(self) -> int:
        """One after the newest sequence number, skipping files that a killed process left without an index entry."""
        sequence = self.index.last_sequence() + 1
        while any(name.startswith(f"{sequence:08d}") for name in _names_in(self.shard(sequence))):
            sequence += 1
        return sequence

    def shard(self, sequence: int) -> Path:
        """The folder of a version; each folder holds a thousand versions, so that none grows without bound."""
        return self.versions_folder / f"{sequence // VERSIONS_A_FOLDER:05d}"

    def _stem(self, sequence: int, submission: Submission) -> Path:
        folder = self.shard(sequence)
        self.admission.check_folder(folder)
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        return folder / stem_for(sequence, submission.tag, submission.image_id)

    def _version(self, record: Mapping[str, Any]) -> LabelVersion:
        return from_record(record, self.shard(record["sequence"]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Exclude all other writers, in this process and in others."""
        with self._threads, self._processes.acquire(poll_interval=SECONDS_BETWEEN_LOOKS):
            yield

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StorageError(f"the {what} was not kept: {reason.lower()}") from error

    def _check_writable(self, tag: str) -> None:
        if self.read_only:
            raise StorageError(f"the folder {self.folder.name!r} of the label store cannot be written to")
        self.published.check_folder(tag)
        for folder in (self.versions_folder, self.sent_folder):
            self.admission.check_folder(folder)

    def _make_folders(self) -> bool:
        try:
            self.admission.check_folder(self.versions_folder)
            self.versions_folder.mkdir(parents=True, exist_ok=True)
            probe = stage((b"",), self.versions_folder)
            probe.path.unlink()
            return True
        except OSError as error:
            self.repairs.append(f"{self.folder} cannot be written to ({error.strerror}): labels can only be read")
            return False

    def _open(self, index: Path, labels: Path) -> None:
        self.index = VersionIndex(index)
        self.published = PublishedLabels(labels, self.index, self.admission)
        self.repairs += [self.index.opened_with] if self.index.opened_with else []
        if self.admission.refusal_of_folder(self.versions_folder) is not None:
            return  # what lies elsewhere is no version
        self.repairs += repair(self.versions_folder, labels, self.index, self.quarantine, self.read_only)
        if not self.read_only:
            self.repairs += self.put_right()


def _as_version(submission: Submission, sequence: int, file: Path, size: int, sha256: str) -> LabelVersion:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return LabelVersion(
        **_submission_fields(submission),
        sequence=sequence,
        version_id=f"{sequence:08d}-{sha256[:8] or 'removal'}",
        file=file,
        size=size,
        sha256=sha256,
        saved_at=now,
    )


def _submission_fields(submission: Submission) -> dict[str, Any]:
    return {name: getattr(submission, name) for name in Submission.__dataclass_fields__}


def _write_side_car(stem: Path, record: Mapping[str, Any]) -> Path:
    staged = stage((as_json(record),), stem.parent)
    path = stem.with_name(stem.name + ".json")
    os.rename(staged.path, path)
    return path


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
