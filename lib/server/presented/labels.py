"""Final labels of presented cases as DICOM SEGs next to the cases' series; they are never written to disk."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import SegmentationStorage

from lib.configs.preset import Preset
from lib.datastore.records import INFERENCE, LabelVersion
from lib.datastore.series import SeriesDatastore
from lib.dicom.attributes import Json, to_json
from lib.dicom.index import SeriesEntry
from lib.dicom.presented.instances import uid_of
from lib.dicom.retrieve import whole_file
from lib.dicom.segmentation_writer import SERIES_NUMBER, Origin
from lib.errors import NotFoundError
from lib.transforms.volume import read_volume


class Cases(Protocol):
    """The part of the presented cases' interface that this module uses."""

    def case_of(self, uid: str) -> str | None:
        """The case whose study or series has this UID; None if there is none."""

    def is_presented(self, image_id: str) -> bool:
        """Whether a series is generated from an image."""

    def describe(self, case: str) -> Dataset:
        """The attributes that all instances of its series share."""

    def as_segmentation(self, case: str, labels: npt.NDArray[Any], preset: Preset, origin: Origin) -> Dataset:
        """A mask on the case's own grid as a SEG of its series."""


class PresentedLabels:
    """The newest final label of each presented case, as a series of its study.

    Args:
        presented: the cases.
        store: the studies, with the label history.
        presets: the served presets, by name; labels of other presets are not presented.
    """

    def __init__(self, presented: Cases, store: SeriesDatastore, presets: Mapping[str, Preset]) -> None:
        self._presented, self._store, self._presets = presented, store, presets
        self._lock = threading.Lock()
        self._entries: dict[str, tuple[LabelVersion, SeriesEntry]] = {}  # by case, for the newest requested version
        self._versions: dict[str, LabelVersion] = {}  # by series, for the same versions
        self._made: tuple[str, FileDataset] | None = None

    def entries(self) -> list[SeriesEntry]:
        """The series of all labels; no mask is read."""
        shown = [version for version in self._store.history.all_latest() if self._is_shown(version)]
        with self._lock:
            for case in self._entries.keys() - {version.image_id for version in shown}:
                self._forget(case)
        return [self._entry(version) for version in shown]

    def of_case(self, case: str) -> LabelVersion | None:
        """The presented label of a case; None if there is none."""
        version = self._store.history.latest(case)
        return version if version is not None and self._is_shown(version) else None

    def find(self, series: str) -> LabelVersion | None:
        """The label whose series has this UID; None if there is none, or if there is a newer label."""
        if not series.startswith("2.25."):
            return None
        if series not in self._versions:
            if self._presented.case_of(series) is not None:
                return None  # called for each frame that a viewer loads, so the labels of all cases are not searched
            self.entries()
        version = self._versions.get(series)
        newest = None if version is None else self.of_case(version.image_id)
        return (
            version if version is not None and newest is not None and newest.version_id == version.version_id else None
        )

    def first(self, version: LabelVersion) -> Json:
        """DICOM JSON of a label for a query, without generating the SEG."""
        return self._entry(version).summary

    def instance(self, version: LabelVersion, study: str = "", sop: str = "") -> FileDataset:
        """The label as a DICOM SEG.

        Raises:
            NotFoundError: if the address names another study or instance, or if the mask no longer exists.
            ImageError, LabelError: if the case or the mask is not suitable.
        """
        seg = self._make(version)
        if study not in ("", str(seg.StudyInstanceUID)) or sop not in ("", str(seg.SOPInstanceUID)):
            raise NotFoundError("instance below", "/".join(filter(None, (study, seg.SeriesInstanceUID, sop))))
        return seg

    def _make(self, version: LabelVersion) -> FileDataset:
        made = self._made
        if made is not None and made[0] == version.version_id:
            return made[1]
        labels = np.rint(read_volume(self._store.history.mask(version)).voxels).astype(np.uint8)
        preset = self._presets[version.preset]
        seg = self._presented.as_segmentation(version.image_id, labels, preset, origin_of(version))
        seg.SeriesInstanceUID, seg.SOPInstanceUID = _uid(version, "series"), _uid(version, "instance")
        seg.file_meta.MediaStorageSOPInstanceUID = seg.SOPInstanceUID
        whole = dcmread(io.BytesIO(whole_file(seg).content))
        self._made = version.version_id, whole
        return whole

    def _is_shown(self, version: LabelVersion) -> bool:
        return version.preset in self._presets and self._presented.is_presented(version.image_id)

    def _entry(self, version: LabelVersion) -> SeriesEntry:
        with self._lock:
            known = self._entries.get(version.image_id)
            if known is not None and known[0].version_id == version.version_id:
                return known[1]
            header = self._presented.describe(version.image_id)
            header.Modality = "SEG"
            header.SeriesInstanceUID, header.SOPInstanceUID = _uid(version, "series"), _uid(version, "instance")
            header.SOPClassUID, header.SeriesNumber = SegmentationStorage, SERIES_NUMBER + 1
            header.SeriesDescription = origin_of(version).description[:64]
            entry = SeriesEntry(header.StudyInstanceUID, header.SeriesInstanceUID, to_json(header), 1, 1)
            self._forget(version.image_id)
            self._entries[version.image_id], self._versions[entry.series] = (version, entry), version
            return entry

    def _forget(self, case: str) -> None:
        """Remove a case's label from the cache, after it was replaced or removed."""
        known = self._entries.pop(case, None)
        if known is not None:
            self._versions.pop(known[1].series, None)


def _uid(version: LabelVersion, what: str) -> str:
    return uid_of(f"{version.image_id}/{version.version_id}", f"label {what}")


def origin_of(version: LabelVersion) -> Origin:
    """How a label was created, for a DICOM SEG: by a network alone if its mask was not changed."""
    if not version.model_version:
        return Origin("MANUAL", "", version.user)
    made_by = f"{version.model_version} ({version.engine})" if version.engine else version.model_version
    is_unchanged = version.voxels_changed == 0 or version.source == INFERENCE
    return Origin("AUTOMATIC" if is_unchanged else "SEMIAUTOMATIC", made_by, version.user)
