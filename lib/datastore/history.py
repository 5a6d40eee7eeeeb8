"""Every label that was ever submitted, as versions that are never changed, and the newest of each where tools look.

    history/versions/00000/00000042.final.case_7.nii.gz    the 42nd label of this store
    history/versions/00000/00000042.final.case_7.json      who, when, from which prediction, label map, SHA-256
    history/sent/00000/00000042.final.case_7.nrrd          what came, where another file was made of it
    history/index.sqlite                                   the same for looking up; made anew from the files if lost
    labels/final/case_7.nii.gz                             a copy of the newest version, for MONAI Label and other tools

A version counts from the moment at which its label has its name; its JSON is there already. Several processes may
write to one store: a lock file lets one of them at a time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
from lib.storage.admission import is_what_was_kept
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
    """The versions of all labels of one store.

    Opening it repairs what a crash, a full disk or somebody's hand has left behind; ``repairs`` says what was done.
    In a folder that cannot be written to it can be read.

    Args:
        folder: of the history; made if it is not there.
        labels: where the newest versions are published, in one folder a tag.
        adopts: take in what somebody put in the place of a published label; False where somebody checks it first.
    """

    def __init__(self, folder: Path, labels: Path, adopts: bool = True) -> None:
        self._adopts = adopts
        self.folder, self.versions_folder, self.sent_folder = folder, folder / "versions", folder / SENT_FOLDER
        self.quarantine = Quarantine(folder / "quarantine")
        self.repairs: list[str] = []
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
        """The newest version; None where there is none, or the label has been removed since."""
        record = self.index.newest(image_id, tag)
        return None if record is None or record.get("removal") else self._version(record)

    def all_latest(self, tag: str = FINAL) -> list[LabelVersion]:
        """The newest version of each image that has one, in the order in which they were saved."""
        return [self._version(record) for record in self.index.all_newest(tag)]

    def versions(self, image_id: str, tag: str = FINAL) -> list[LabelVersion]:
        """All versions of an image's label, the oldest first."""
        return [self._version(record) for record in self.index.of_image(image_id, tag)]

    def since(self, sequence: int) -> list[LabelVersion]:
        """All versions that were saved after that one, the oldest first."""
        return [self._version(record) for record in self.index.since(sequence) if not record.get("removal")]

    def lately(self) -> list[LabelVersion]:
        """The versions among the newest thousand of the store, the oldest first, without what clients sent along.

        Each is read once, and kept: pages ask for all of them whenever something has changed.
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
        """The version with an id.

        Raises:
            NotFoundError: when there is none of that id.
        """
        record = self.index.find(version_id)
        if record is None:
            raise NotFoundError("version", version_id[:200])
        return self._version(record)

    def is_kept(self, version: LabelVersion) -> bool:
        """Whether a version's mask is there as it was saved, and no link to something else lies in its place."""
        return is_what_was_kept(version.file, self.folder, version.sha256)

    def mask(self, version: LabelVersion) -> Path:
        """The file of a version's mask.

        Raises:
            NotFoundError: when it is gone, or a link to something else lies in its place.
        """
        return self._kept(version, version.file, version.sha256, "file of version")

    def sent(self, version: LabelVersion) -> Path:
        """The file as it came.

        Raises:
            NotFoundError: as :meth:`mask`.
        """
        if not version.sent_file:
            return self.mask(version)
        file = self.sent_folder / self.shard(version.sequence).name / version.sent_file
        return self._kept(version, file, version.sent_sha256, "sent file of version")

    # ------------------------------------------------------------------------------------------------ writing

    def append(self, file: Path, submission: Submission, sent: Path | None = None) -> LabelVersion:
        """Keep a label for good, and publish it. When this returns, neither a crash nor a power cut can lose it.

        Args:
            file: the mask.
            submission: what is known of it.
            sent: the file that it was made of, which is kept too; None where it is that file.

        Raises:
            ConflictError: as :meth:`check_replaceable`.
            StorageError: when it cannot be kept; then nothing has changed.
        """
        with self._explained(f"label of {submission.image_id!r}"):
            self._check_writable()
            staged = stage(read_blocks(file), self.versions_folder)
            try:
                with self._alone():
                    if submission.source == INFERENCE:
                        self.check_replaceable(submission.image_id, submission.tag)
                    return self._append(staged, suffix_of(file), submission, sent)
            finally:
                staged.path.unlink(missing_ok=True)

    def check_replaceable(self, image_id: str, tag: str) -> None:
        """Refuse to put a model's mask in the place of what a person drew.

        Raises:
            ConflictError: saying who drew it and when.
        """
        drawn = self.latest(image_id, tag)
        if drawn is not None and drawn.is_drawn:
            whose = f"by {drawn.user!r} " if drawn.user else ""
            raise ConflictError(
                f"the label {tag!r} of {image_id!r} was submitted {whose}at {drawn.saved_at}, and a model's mask does "
                "not replace it; valid: another tag, such as original"
            )

    def restore(self, version_id: str, user: str, client_id: str = "") -> LabelVersion:
        """Make a copy of an older version the newest one; what lies between them stays.

        Raises:
            NotFoundError: when there is none of that id.
            StorageError: as :meth:`append`; also when the old version's file is no longer what it was.
        """
        old = self.get(version_id)
        if not old.file.is_file() or sha256_of(old.file) != old.sha256:
            raise StorageError(f"the file of version {version_id!r} is not what was saved, and is not restored")
        changes = {"user": user, "client_id": client_id, "source": "restore", "restored_from": version_id, "notes": ()}
        return self.append(old.file, Submission(**(_submission_fields(old) | changes)))

    def remove(self, image_id: str, tag: str, user: str = "") -> None:
        """Take a label out of ``labels/<tag>``; its versions stay and can be restored.

        Raises:
            StorageError: when that cannot be kept.
        """
        with self._explained(f"removal of the label of {image_id!r}"):
            self._check_writable()
            with self._alone():
                self._remove(Submission(image_id=image_id, tag=tag, user=user, source="removal"))

    def adopt(self, file: Path, submission: Submission, kept: Path | None = None) -> LabelVersion | None:
        """Take in a label that somebody put into ``labels/<tag>``; None where it is a version already.

        Args:
            file: what was put there.
            submission: what is known of it.
            kept: the label in the form in which it is kept, where that is another file.

        Raises:
            StorageError: as :meth:`append`.
        """
        if self._is_version(file, submission.image_id, submission.tag):
            self.publish_again(submission.image_id, submission.tag)
            return None
        return self.append(kept or file, submission, None if kept in (None, file) else file)

    def adopt_all(self, labels: Sequence[tuple[Path, Submission]]) -> list[LabelVersion]:
        """Take in many labels that lie in ``labels/<tag>`` and have no version yet, as at the first start in a folder.

        They are synced to disk together, since each lies in its folder as it did before until that is done.

        Raises:
            StorageError: when they cannot be kept.
        """
        with self._explained(f"{len(labels)} labels of the folder"), self._alone():
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
        """Put the newest version back into ``labels/<tag>``.

        Raises:
            StorageError: when it cannot be written.
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
        """Take in what lies in ``labels/<tag>`` instead of a newest version where it is new; replace it where not.

        Returns:
            A sentence for each thing that was done.
        """
        done = []
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
                self.publish_again(image_id, tag)
                done.append(f"{tag}/{image_id}{version.suffix} was not the newest version, and was written again")
        return shorten(done)

    def keep_info(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Keep what is known of an image (``tag`` empty) or a label besides its versions.

        Raises:
            StorageError: when it cannot be kept.
        """
        with self._explained(f"information about {image_id!r}"):
            self.index.keep_info(image_id, tag, info)

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
                self.index.forget_info(version.image_id, version.tag)  # it was about the version before
                self.published.note(version, copy)
        except BaseException:
            for path in (file, side_car, copy, came):
                if path is not None:
                    path.unlink(missing_ok=True)
            raise
        self.published.put(version, copy)
        return version

    def _is_version(self, file: Path, image_id: str, tag: str) -> bool:
        """Whether a file is what was kept or sent as one of the versions."""
        digest = sha256_of(file)
        return any(digest in (version.sha256, version.sent_sha256) for version in self.versions(image_id, tag))

    def _keep_sent(self, sent: Path, stem: Path) -> tuple[Path, str]:
        """Keep a file as it came under its version's name; returns where, and its SHA-256."""
        folder = self.sent_folder / stem.parent.name
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
        """One after the newest; past files that a process left without having told the index of them."""
        sequence = self.index.last_sequence() + 1
        while any(name.startswith(f"{sequence:08d}") for name in _names_in(self.shard(sequence))):
            sequence += 1
        return sequence

    def shard(self, sequence: int) -> Path:
        """The folder of a version: a thousand of them in each, so that no folder grows without bound."""
        return self.versions_folder / f"{sequence // VERSIONS_A_FOLDER:05d}"

    def _stem(self, sequence: int, submission: Submission) -> Path:
        folder = self.shard(sequence)
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        return folder / stem_for(sequence, submission.tag, submission.image_id)

    def _version(self, record: Mapping[str, Any]) -> LabelVersion:
        return from_record(record, self.shard(record["sequence"]))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes meanwhile: no other thread, no other process."""
        with self._threads, self._processes.acquire(poll_interval=SECONDS_BETWEEN_LOOKS):
            yield

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise StorageError(f"the {what} was not kept: {reason.lower()}") from error

    def _check_writable(self) -> None:
        if self.read_only:
            raise StorageError(f"the folder {self.folder.name!r} of the label store cannot be written to")

    def _make_folders(self) -> bool:
        try:
            self.versions_folder.mkdir(parents=True, exist_ok=True)
            probe = stage((b"",), self.versions_folder)
            probe.path.unlink()
            return True
        except OSError as error:
            self.repairs.append(f"{self.folder} cannot be written to ({error.strerror}): labels can only be read")
            return False

    def _open(self, index: Path, labels: Path) -> None:
        self.index = VersionIndex(index)
        self.published = PublishedLabels(labels, self.index)
        self.repairs += [self.index.opened_with] if self.index.opened_with else []
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
