"""Titles of cases on the pages: patient, study and series instead of a bare UID."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from monailabel.interfaces.datastore import Datastore

from lib.datastore.series import SeriesDatastore
from lib.dicom.sources import SeriesInfo
from lib.errors import UpstreamError


@dataclass(frozen=True)
class Title:
    """A case's title, and its id if that differs."""

    name: str
    small: str = ""


def title_of(image: str, info: SeriesInfo | None) -> Title:
    """The title of an image; for a series, its patient, study, date and description, as far as known.

    Users with access to the pages also have access to the studies by DICOMweb, including patients' names.
    """
    if info is None:
        return Title(image)
    shown, known = info.shown, info.attributes
    patient = " ".join(filter(None, (person(shown.get("PatientName", "")), known["PatientID"])))
    parts = (patient, shown.get("StudyDescription", ""), day(known["StudyDate"]), shown.get("SeriesDescription", ""))
    title = ", ".join(part for part in parts if part)
    return Title(title, image) if title else Title(image)


def titles_of(datastore: Datastore, images: Iterable[str]) -> Mapping[str, Title]:
    """The titles of images, including images that no longer exist."""
    try:
        series = datastore.series() if isinstance(datastore, SeriesDatastore) else {}
    except UpstreamError:  # a PACS that has never responded
        series = {}
    return {image: title_of(image, series.get(image)) for image in images}


def person(name: str) -> str:
    """A person's name (PS3.5, 6.2) in readable form.

    >>> person("Yamada^Tarou^^Dr")
    'Yamada, Dr Tarou'
    """
    family, given, middle, prefix, suffix = (*name.split("=")[0].split("^"), "", "", "", "", "")[:5]
    rest = " ".join(filter(None, (prefix, given, middle, suffix)))
    return ", ".join(filter(None, (family.strip(), rest.strip())))


def day(date: str) -> str:
    """A DICOM date in readable form; an invalid one is returned unchanged.

    >>> day("20260131")
    '2026-01-31'
    """
    return f"{date[:4]}-{date[4:6]}-{date[6:]}" if len(date) == 8 and date.isdigit() else date
