"""Regular series for series that viewers cannot show: their list and their attributes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress

from pydicom.dataset import Dataset

from lib.datastore.series import SeriesDatastore
from lib.dicom.attributes import to_json
from lib.dicom.index import DicomIndex, SeriesEntry
from lib.dicom.presented.instances import uid_of
from lib.dicom.presented.regular import Regular, describe_regular
from lib.errors import NotFoundError


class RegularSeries:
    """For each tilted, uneven or mixed series that can be segmented, the series that viewers can show.

    Args:
        store: the studies.
        index: index of their DICOM files; None if there are none, or if presentation is disabled.
    """

    def __init__(self, store: SeriesDatastore, index: DicomIndex | None) -> None:
        self._store, self._index = store, index
        self._by_uid: tuple[Mapping[str, Regular], dict[str, str]] = ({}, {})

    def sources(self, study: str = "") -> list[str]:
        """The images with a regular series, of all studies or of one."""
        if self._index is None or not (regular := self._index.regular()):
            return []
        images = self._store.series()
        return [uid for uid in regular if uid in images and study in ("", images[uid].study)]

    def has(self, image_id: str) -> bool:
        """Whether an image has a regular series."""
        return self._index is not None and image_id in self._index.regular() and image_id in self._store.series()

    def uid(self, image_id: str) -> str:
        """The Series Instance UID of an image's regular series; "" if it has none."""
        return uid_of(image_id, "regular series") if self.has(image_id) else ""

    def source_of(self, uid: str) -> str | None:
        """The image whose regular series has this UID; None if there is none."""
        if self._index is None:
            return None
        regular, by_uid = self._index.regular(), self._by_uid
        if by_uid[0] is not regular:  # the index returns a new dictionary after any change
            self._by_uid = by_uid = (regular, {uid_of(image, "regular series"): image for image in regular})
        source = by_uid[1].get(uid)
        return source if source is not None and self.has(source) else None

    def entries(self) -> list[SeriesEntry]:
        """The series for a query; no file is opened. A source that is removed meanwhile is left out."""
        entries = []
        for image in self.sources():
            with suppress(NotFoundError):
                entries.append(self._entry(image))
        return entries

    def describe(self, image_id: str) -> Dataset:
        """The attributes that all instances of an image's regular series share.

        Raises:
            NotFoundError: if it no longer has one.
        """
        return self._describe(image_id)[0]

    def _entry(self, image_id: str) -> SeriesEntry:
        header, slices = self._describe(image_id)
        header.SOPInstanceUID, header.InstanceNumber = uid_of(image_id, "regular instance 1"), 1
        return SeriesEntry(str(header.StudyInstanceUID), str(header.SeriesInstanceUID), to_json(header), slices, slices)

    def _describe(self, image_id: str) -> tuple[Dataset, int]:
        """The attributes that all instances of an image's regular series share, and the number of its slices.

        Raises:
            NotFoundError: if it no longer has one.
        """
        entry = self._index.series().get(image_id) if self._index is not None else None
        regular = self._index.regular().get(image_id) if self._index is not None else None
        if entry is None or regular is None:
            raise NotFoundError("regular series of image", image_id)
        return describe_regular(entry.summary, image_id, regular.why), regular.slices
