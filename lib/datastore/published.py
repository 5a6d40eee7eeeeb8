"""``labels/<tag>/<image>.nii.gz``: copies of the newest versions, for MONAI Label and other tools."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lib.datastore.index import VersionIndex
from lib.datastore.records import LABEL_SUFFIXES, LabelVersion, suffix_of
from lib.storage.admission import Admission
from lib.storage.files import read_blocks, sha256_of, stage


class PublishedLabels:
    """The folder of copies of the newest versions, so that tools that write there cannot change a stored version.

    Args:
        folder: folder with a subfolder for each tag.
        index: records the copies.
        admission: judges folders: nothing is written, removed or compared behind a link out of the studies.
    """

    def __init__(self, folder: Path, index: VersionIndex, admission: Admission) -> None:
        self.folder = folder
        self._index, self._admission = index, admission

    def check_folder(self, tag: str) -> None:
        """Refuse a tag whose folder is a link out of the studies.

        Raises:
            PermissionError: whose ``strerror`` says why.
        """
        self._admission.check_folder(self.folder / tag)

    def stage(self, version: LabelVersion, content: Path) -> Path:
        """Write a copy with a temporary name, so that a full disk is noticed before anything changes.

        Raises:
            OSError: whose ``strerror`` says why it cannot be written, or cannot get its final name.
        """
        self.check_folder(version.tag)
        folder, target = self.folder / version.tag, self._target(version)
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, f"a folder lies where its file {target.name!r} belongs; remove it")
        folder.mkdir(parents=True, exist_ok=True)
        # The version itself is durable: a copy that a power failure damages is repaired at the next start.
        return stage(read_blocks(content), folder, durable=False).path

    def note(self, version: LabelVersion, staged: Path) -> None:
        """Record the copy's size and time."""
        status = staged.stat()
        self._index.note_published(
            version.image_id, version.tag, version.sequence, version.suffix, status.st_size, status.st_mtime_ns
        )

    def put(self, version: LabelVersion, staged: Path) -> None:
        """Rename the copy to its final name, and remove copies with other extensions."""
        target = self._target(version)
        os.replace(staged, target)
        for other in self.files(version.image_id, version.tag):
            if other != target:
                other.unlink(missing_ok=True)

    def take_away(self, image_id: str, tag: str) -> None:
        """Remove an image's label."""
        for file in self.files(image_id, tag):
            file.unlink(missing_ok=True)
        self._index.forget_published(image_id, tag)

    def files(self, image_id: str, tag: str) -> list[Path]:
        """The files of an image's label, with any extension."""
        row = self._index.published(image_id, tag)
        suffixes = {*LABEL_SUFFIXES, *((row["suffix"],) if row else ())}
        paths = [self.folder / tag / f"{image_id}{suffix}" for suffix in sorted(suffixes)]
        return [path for path in paths if path.is_file()]

    def is_ours(self, image_id: str, tag: str, file: Path) -> bool:
        """Whether a file is unchanged since it was copied there, by its size and time."""
        row, status = self._index.published(image_id, tag), file.stat()
        return row is not None and (row["suffix"], row["size"], row["mtime_ns"]) == (
            suffix_of(file), status.st_size, status.st_mtime_ns,
        )  # fmt: skip

    def note_if_right(self, version: LabelVersion) -> bool:
        """Record the newest version as published if its file is there already; returns whether it is."""
        files = self.files(version.image_id, version.tag)
        if len(files) != 1 or suffix_of(files[0]) != version.suffix or sha256_of(files[0]) != version.sha256:
            return False
        self.note(version, files[0])
        return True

    def astray(self) -> list[tuple[str, str]]:
        """Image and tag of the newest versions whose copies are missing or changed."""
        rows = self._index.newest_and_published()
        tags = {tag for tag in self._index.tags() if self._admission.refusal_of_folder(self.folder / tag) is None}
        return [
            (row["image_id"], row["tag"])
            for row in rows
            if row["tag"] in tags
            and (row["published"] != row["sequence"] or not self._lies_there(row["image_id"], row["tag"], row))
        ]

    def _target(self, version: LabelVersion) -> Path:
        return self.folder / version.tag / f"{version.image_id}{version.suffix}"

    def _lies_there(self, image_id: str, tag: str, row: object) -> bool:
        suffix, size, mtime_ns = (row[name] for name in ("suffix", "size", "mtime_ns"))  # type: ignore[index]
        try:
            status = os.stat(self.folder / tag / f"{image_id}{suffix}")
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (size, mtime_ns)
