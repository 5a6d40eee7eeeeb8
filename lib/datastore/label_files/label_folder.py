"""Watches ``labels/final`` for changes by other tools: valid labels become versions, invalid ones are refused and
reported.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.configs.preset import Preset
from lib.datastore.history import LabelHistory
from lib.datastore.label_files.found_labels import (
    FOLDER,
    FoundLabel,
    Problem,
    check_label_file,
    fingerprint,
    label_files,
    stray_files,
)
from lib.datastore.records import FINAL, Submission
from lib.errors import ImageError, LabelError, NotFoundError, UpstreamError
from lib.transforms.volume import read_grid

logger = logging.getLogger("unetr.datastore")

SECONDS_A_LOOK = 30.0
"""Time limit for checking labels before other work continues."""


@dataclass(frozen=True)
class Candidate:
    """A file that may be a label.

    Attributes:
        file: its path.
        known: its description, as far as known.
        image: file of its image, which for a DICOM series is converted if necessary.
        image_stamp: value that changes with the image.
    """

    file: Path
    known: Submission
    image: Callable[[], Path]
    image_stamp: str


class LabelFolder:
    """The folder of final labels of a store.

    Args:
        history: takes in valid labels, and records refused ones.
        folder: ``labels/final``.
        presets: the presets of the labels; without presets, all files are taken in.
    """

    def __init__(self, history: LabelHistory, folder: Path, presets: Sequence[Preset]) -> None:
        self.history, self.folder, self.presets = history, folder, presets
        self._fingerprint = fingerprint(presets)

    def files(self) -> list[Path]:
        """The labels in the folder, oldest first."""
        return label_files(self.folder) if self._is_own() else []

    def examine(self, candidates: Iterable[Candidate], folder: Path) -> tuple[list[FoundLabel], bool]:
        """Check labels that are new or changed; invalid ones are also copied to the quarantine.

        Of several labels of one image, the newest valid one is used.

        Args:
            candidates: oldest first.
            folder: for new files.

        Returns:
            The valid labels, and whether all candidates were checked within the time limit.
        """
        labels, deadline = dict[str, FoundLabel](), time.monotonic() + SECONDS_A_LOOK
        refused = self.history.index.refused()
        for number, candidate in enumerate(reversed(list(candidates))):
            try:
                stamp, image = self._stamp(candidate), candidate.known.image_id
            except FileNotFoundError:  # somebody has removed it meanwhile
                continue
            if refused.get(candidate.file.name, ("", ""))[0] == stamp:
                continue
            if time.monotonic() > deadline:
                return list(labels.values())[::-1], False
            if image in labels:
                self._refuse(candidate, stamp, f"there is a newer label of the same image, {labels[image].file.name!r}")
                continue
            own = folder / str(number)
            own.mkdir()
            label = self._check(candidate, stamp, own)
            if label is not None:
                labels[image] = label
        return list(labels.values())[::-1], True

    def take_in(self, labels: Sequence[FoundLabel]) -> int:
        """Store labels as versions; returns the number of new ones."""
        plain = [one for one in labels if one.kept == one.file]
        new = [one for one in plain if not self._versions(one)]
        taken = len(self.history.adopt_all([(one.file, one.submission) for one in new]))
        for one in labels:
            if one not in new:
                taken += self.history.adopt(one.file, one.submission, one.kept) is not None
                self._take_away(one)
            self.history.index.forget_refused(one.file.name)
        return taken

    def problems(self, images: Mapping[str, object]) -> list[Problem]:
        """The refused files in the folder, with their reasons."""
        if not self._is_own():
            return []
        refused = self.history.index.refused()
        there = {file.name for file in self.files()}
        reasons = {name: reason for name, (_, reason) in sorted(refused.items()) if name in there}
        return [Problem(f"{FOLDER}/{name}", reason) for name, reason in reasons.items()] + stray_files(
            self.folder, images
        )

    def _is_own(self) -> bool:
        return self.history.admission.refusal_of_folder(self.folder) is None

    def _check(self, candidate: Candidate, stamp: str, folder: Path) -> FoundLabel | None:
        file = candidate.file
        if not self.presets:
            return FoundLabel(file, file, candidate.known)
        try:
            return check_label_file(file, read_grid(candidate.image()), candidate.known, self.presets, folder)
        except (
            NotFoundError,
            UpstreamError,
        ) as error:  # the series is gone, or its PACS does not respond: it is checked later
            logger.warning("label store: %s/%s is not looked at yet: %s", FOLDER, file.name, error)
        except ImageError as error:
            self._refuse(candidate, stamp, f"it cannot be held against its image: {error}")
        except LabelError as error:
            self._refuse(candidate, stamp, str(error))
        return None

    def _refuse(self, candidate: Candidate, stamp: str, reason: str) -> None:
        """Refuse a label: its case stays unlabelled. A version that it had replaced is published again."""
        name, known = candidate.file.name, candidate.known
        details = {"image_id": known.image_id, "tag": known.tag, "source": "folder", "file_name": name}
        self.history.index.keep_refused(name, stamp, reason)
        try:
            kept = self.history.quarantine.keep(candidate.file, reason, details)
        except OSError as error:  # it stays where it is: nobody's work is overwritten
            logger.error("label store: %s/%s is left out: %s; it is not in quarantine: %s", FOLDER, name, reason, error)
            return
        logger.warning("label store: %s/%s is left out (in quarantine as %s): %s", FOLDER, name, kept.name, reason)
        version = self.history.latest(known.image_id, known.tag)
        if version is not None and name == f"{known.image_id}{version.suffix}":
            self.history.publish_again(known.image_id, known.tag)
            logger.warning("label store: %s/%s is the last good version again", FOLDER, name)

    def _take_away(self, label: FoundLabel) -> None:
        """Remove a file from the folder after its label has been stored as a version with another file name."""
        version = self.history.latest(label.submission.image_id, FINAL)
        target = self.folder / f"{label.submission.image_id}{version.suffix}" if version else label.file
        if label.file.exists() and target.exists() and not label.file.samefile(target):
            label.file.unlink()

    def _versions(self, label: FoundLabel) -> bool:
        return bool(self.history.versions(label.submission.image_id, label.submission.tag))

    def _stamp(self, candidate: Candidate) -> str:
        """A value that changes with the label, its image or the presets."""
        label = candidate.file.stat()
        return "/".join([f"{label.st_size}-{label.st_mtime_ns}", candidate.image_stamp, self._fingerprint])


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    """A temporary folder for files converted from labels."""
    return tempfile.TemporaryDirectory(prefix="unetr-", ignore_cleanup_errors=True)
