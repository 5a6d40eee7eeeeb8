"""Where series come from: what is asked of a source, and a folder with its index as one."""

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
from lib.errors import NotFoundError, ParameterError
from lib.storage.files import replacing

INFO_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "StudyDate", "StudyTime", "Modality")
"""What clients are told of a series."""
SHOWN_KEYWORDS = ("PatientName", "StudyDescription", "SeriesDescription")
"""What the page shows of it beside that."""
MATCHED_KEYWORDS = (
    *("SeriesDescription", "ProtocolName", "Modality", "BodyPartExamined", "FrameOfReferenceUID"),
    *SEQUENCE_KEYWORDS,
)
"""By which series are told apart as the sequences of a case."""
MOST_PROBLEMS = 200
SEGMENTATIONS = "segmentations"
STORED = "stored"
"""Folders for SEGs of series, and for other instances that are stored, in a folder of studies."""


@dataclass(frozen=True)
class SeriesInfo:
    """A series that can be segmented.

    Attributes:
        uid: Series Instance UID.
        study: Study Instance UID.
        attributes: what clients show of it, by keyword.
        shown: patient's name and descriptions, which the page shows and nothing keeps.
        matched: values of the attributes by which sequences are told apart, as far as they are known.
    """

    uid: str
    study: str
    attributes: Mapping[str, str]
    shown: Mapping[str, str] = field(default_factory=dict)
    matched: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class SeriesSource(Protocol):
    """What the datastore needs of it."""

    def start(self) -> None:
        """Keep up to date in the background, until ``stop``."""

    def stop(self) -> None:
        """End that."""

    def series(self) -> dict[str, SeriesInfo]:
        """The image series of the right modalities, by UID."""

    def stamp(self, uid: str) -> str:
        """Changes when the series does."""

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """The files of a series; ``folder``, which is empty, may be used for them."""

    def in_frame_of_reference(self, frame: str, study: str) -> list[str]:
        """The image series that may lie in a frame of reference, of an instance of a study."""

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """Put a SEG where viewers find it, in place of the one of that series before it."""

    def keep_instance(self, instance: Dataset) -> None:
        """Add an instance to what there is."""

    def status(self) -> dict[str, Any]:
        """What is told of it."""

    def problem(self) -> str:
        """Why its list of series may be wrong now, in a sentence; empty when nothing is known to be."""


class FolderSource:
    """Series of an index.

    Args:
        index: of the folder.
        modalities: those that can be segmented.
    """

    def __init__(self, index: DicomIndex, modalities: Collection[str]) -> None:
        self.index = index
        self._modalities = frozenset(modalities)
        self._scanning = threading.Lock()
        self._listed: tuple[dict[str, SeriesEntry], dict[str, SeriesInfo]] = ({}, {})

    def start(self) -> None:
        """As :class:`SeriesSource`."""
        self.index.start()

    def stop(self) -> None:
        """As :class:`SeriesSource`."""
        self.index.stop()

    def series(self) -> dict[str, SeriesInfo]:
        """As :class:`SeriesSource`; scans the folder first in a process without a background scan."""
        with self._scanning:
            if not self.index.is_started and not self.index.progress.scans:
                self.index.scan()
        entries, known = self.index.series(), self._listed
        if known[0] is not entries:  # the index makes another dictionary when anything has changed
            listed = {
                uid: series_info(entry.summary)
                for uid, entry in entries.items()
                if entry.modality in self._modalities and entry.frames > 1
            }
            self._listed = known = (entries, listed)
        return known[1]

    def stamp(self, uid: str) -> str:
        """As :class:`SeriesSource`."""
        entry = self.index.series().get(uid)
        return self.index.stamp(uid, entry.study if entry else "")

    def fetch(self, uid: str, folder: Path) -> list[Path]:
        """As :class:`SeriesSource`; the files as they lie.

        Raises:
            NotFoundError: when there is no such series.
        """
        entry = self.index.series().get(uid)
        files = [instance.file for instance in self.index.instances(entry.study, uid)] if entry else []
        if not files:
            raise NotFoundError("series", uid)
        return files

    def in_frame_of_reference(self, frame: str, study: str) -> list[str]:
        """As :class:`SeriesSource`; of any study, by the index."""
        entries = self.index.series()
        listed = [uid for uid in self.series() if uid in entries]  # the index may have changed in between
        uids = [uid for uid in listed if first_value(entries[uid].summary, "FrameOfReferenceUID") == frame]
        return sorted(uids, key=lambda uid: entries[uid].study != study)

    def keep_segmentation(self, seg: Dataset, series_uid: str) -> None:
        """As :class:`SeriesSource`: one file a series, replaced at once or not at all."""
        file = self.index.folder / SEGMENTATIONS / f"{series_uid}.dcm"
        _write(seg, file)
        self.index.add(file)

    def keep_instance(self, instance: Dataset) -> None:
        """As :class:`SeriesSource`: a file of its own below the folder; the same instance again changes nothing.

        Raises:
            ParameterError: when there is another instance of that UID.
        """
        uids = [str(instance.get(k)) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
        file = self.index.folder.joinpath(STORED, *uids[:2], f"{uids[2]}.dcm")
        known = self.index.instance(uids[2])
        if known is not None:
            if _pixels_and_uids(read_instance(known.file)) != _pixels_and_uids(instance):
                raise ParameterError("SOPInstanceUID", uids[2], "the UID of a new instance: another one has it already")
            return
        _write(instance, file)
        self.index.add(file)

    def status(self) -> dict[str, Any]:
        """Files found and indexed, and what could not be read."""
        progress = self.index.progress
        problems = sorted(progress.problems.items())
        return {
            "files": progress.files,
            "indexed": progress.indexed,
            "problems": dict(problems[:MOST_PROBLEMS]),
            "problems_in_all": len(problems),
        }

    def problem(self) -> str:
        """As :class:`SeriesSource`."""
        return self.index.failure()


def _write(instance: Dataset, file: Path) -> None:
    """At once or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as content:
        instance.save_as(content, write_like_original=False)


def _pixels_and_uids(instance: Dataset) -> tuple[Any, ...]:
    return tuple(instance.get(k) for k in ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "PixelData"))


def series_info(summary: Json) -> SeriesInfo:
    """What is told of a series, from its attributes as DICOM JSON."""
    attributes = {keyword: first_value(summary, keyword) for keyword in (*INFO_KEYWORDS, "SeriesDescription")}
    shown = {keyword: first_value(summary, keyword) for keyword in SHOWN_KEYWORDS}
    matched = {keyword: values for keyword in MATCHED_KEYWORDS if (values := all_values(summary, keyword))}
    return SeriesInfo(attributes["SeriesInstanceUID"], attributes["StudyInstanceUID"], attributes, shown, matched)
