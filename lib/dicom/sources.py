"""Sources of series: their interface, and a folder with its index as a source."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydicom.dataset import Dataset

from lib.dicom.attributes import SEQUENCE_KEYWORDS, Json, all_values, first_value
from lib.dicom.files import read_instance
from lib.dicom.index import DicomIndex, SeriesEntry
from lib.errors import NotFoundError, ParameterError, StorageError
from lib.storage.admission import Admission
from lib.storage.files import replacing

INFO_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "StudyDate", "StudyTime", "Modality")
"""Attributes of a series that clients receive."""
SHOWN_KEYWORDS = ("PatientName", "StudyDescription", "SeriesDescription")
"""Further attributes that only the page displays."""
MATCHED_KEYWORDS = (
    *("SeriesDescription", "ProtocolName", "Modality", "BodyPartExamined", "FrameOfReferenceUID"),
    *SEQUENCE_KEYWORDS,
)
"""Attributes that distinguish series as the sequences of a case."""
MOST_PROBLEMS = 200
SEGMENTATIONS = "segmentations"
STORED = "stored"
"""Subfolders of a studies folder for SEGs of series, and for other stored instances."""


@dataclass(frozen=True)
class SeriesInfo:
    """A series that can be segmented.

    Attributes:
        uid: Series Instance UID.
        study: Study Instance UID.
        attributes: attributes that clients display, by keyword.
        shown: patient name and descriptions, which the page displays and nothing stores.
        matched: known values of the attributes that distinguish sequences.
    """

    uid: str
    study: str
    attributes: Mapping[str, str]
    shown: Mapping[str, str] = field(default_factory=dict)
    matched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class SeriesSource(Protocol):
    """The interface of a source of series."""

    def start(self) -> None:
        """Keep the list up to date in the background, until ``stop``."""

    def stop(self) -> None:
        """Stop updating in the background."""

    def series(self) -> dict[str, SeriesInfo]:
        """The image series of the configured modalities, by UID."""

    def stamp(self, uid: str) -> str:
        """A value that changes with the series."""

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """The files of a series; ``folder``, which is empty, may be used for them."""

    def in_frame_of_reference(self, frame: str, study: str) -> list[str]:
        """The image series that may share a frame of reference, for an instance of a study."""

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """Store a SEG where viewers find it, replacing an earlier one of that series."""

    def keep_instance(self, instance: Dataset) -> None:
        """Store an instance."""

    def status(self) -> dict[str, Any]:
        """The state of the source, for clients."""

    def problem(self) -> str:
        """Why its list of series may be outdated, as a sentence; empty if no problem is known."""


class FolderSource:
    """The series of an index as a source.

    Args:
        index: index of the folder.
        modalities: modalities that can be segmented.
        admission: judges folders: nothing is stored behind a link out of the index's folder.
    """

    def __init__(self, index: DicomIndex, modalities: Collection[str], admission: Admission | None = None) -> None:
        self.index = index
        self._admission = admission or Admission(index.folder)
        self._modalities = frozenset(modalities)
        self._scanning = threading.Lock()
        self._listed: tuple[dict[str, SeriesEntry], dict[str, SeriesInfo]] = ({}, {})

    def start(self) -> None:
        """See :class:`SeriesSource`."""
        self.index.start()

    def stop(self) -> None:
        """See :class:`SeriesSource`."""
        self.index.stop()

    def series(self) -> dict[str, SeriesInfo]:
        """See :class:`SeriesSource`; without a background scan, the folder is scanned first."""
        with self._scanning:
            if not self.index.is_started and not self.index.progress.scans:
                self.index.scan()
        entries, known = self.index.series(), self._listed
        if known[0] is not entries:  # the index returns a new dictionary after any change
            listed = {
                uid: series_info(entry.summary)
                for uid, entry in entries.items()
                if entry.modality in self._modalities and entry.frames > 1
            }
            self._listed = known = (entries, listed)
        return known[1]

    def stamp(self, uid: str) -> str:
        """See :class:`SeriesSource`."""
        entry = self.index.series().get(uid)
        return self.index.stamp(uid, entry.study if entry else "")

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """See :class:`SeriesSource`; returns the original files.

        Raises:
            NotFoundError: if there is no such series.
        """
        entry = self.index.series().get(uid)
        files = [instance.file for instance in self.index.instances(entry.study, uid)] if entry else []
        if not files:
            raise NotFoundError("series", uid)
        return files

    def in_frame_of_reference(self, frame: str, study: str) -> list[str]:
        """See :class:`SeriesSource`; series of any study, by the index."""
        entries = self.index.series()
        listed = [uid for uid in self.series() if uid in entries]  # the index may have changed in between
        uids = [uid for uid in listed if first_value(entries[uid].summary, "FrameOfReferenceUID") == frame]
        return sorted(uids, key=lambda uid: entries[uid].study != study)

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """See :class:`SeriesSource`: one file for each series, replaced atomically."""
        file = self.index.folder / SEGMENTATIONS / f"{series_uid}.dcm"
        self._write(seg, file)
        self.index.add(file)

    def keep_instance(self, instance: Dataset) -> None:
        """See :class:`SeriesSource`: a separate file below the folder; storing the same instance again changes nothing.

        Raises:
            ParameterError: if there is another instance with this UID.
            StorageError: if it cannot be written; nothing has changed then.
        """
        uids = [str(instance.get(k)) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
        file = self.index.folder.joinpath(STORED, *uids[:2], f"{uids[2]}.dcm")
        known = self.index.instance(uids[2])
        if known is not None:
            if _pixels_and_uids(read_instance(known.file)) != _pixels_and_uids(instance):
                raise ParameterError("SOPInstanceUID", uids[2], "the UID of a new instance: another one has it already")
            return
        self._write(instance, file)
        self.index.add(file)

    def _write(self, instance: Dataset, file: Path) -> None:
        """Write an instance atomically."""
        try:
            self._admission.check_folder(file.parent)
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as content:
                instance.save_as(content, write_like_original=False)
        except OSError as error:
            raise StorageError(f"the instance was not kept: {error.strerror or error}") from error

    def status(self) -> dict[str, Any]:
        """Numbers of files found and indexed, and files that could not be read."""
        progress = self.index.progress
        problems = sorted(progress.problems.items())
        return {
            "files": progress.files,
            "indexed": progress.indexed,
            "problems": dict(problems[:MOST_PROBLEMS]),
            "problems_in_all": len(problems),
        }

    def problem(self) -> str:
        """See :class:`SeriesSource`."""
        return self.index.failure()


def _pixels_and_uids(instance: Dataset) -> tuple[Any, ...]:
    return tuple(instance.get(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "PixelData"))


def series_info(summary: Json) -> SeriesInfo:
    """The information on a series, from its attributes in DICOM JSON."""
    attributes = {keyword: first_value(summary, keyword) for keyword in (*INFO_KEYWORDS, "SeriesDescription")}
    shown = {keyword: first_value(summary, keyword) for keyword in SHOWN_KEYWORDS}
    matched = {keyword: values for keyword in MATCHED_KEYWORDS if (values := all_values(summary, keyword))}
    return SeriesInfo(attributes["SeriesInstanceUID"], attributes["StudyInstanceUID"], attributes, shown, matched)
