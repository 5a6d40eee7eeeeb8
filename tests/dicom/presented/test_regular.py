"""Which series have a regular one beside them, by their headers alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from lib.dicom.attributes import Json, summarize, to_json
from lib.dicom.presented.regular import Regular, describe_regular, regular_for
from tests.dicom.conftest import edit

Make = Callable[..., list[Path]]


def told(files: list[Path]) -> list[Json]:
    return [to_json(dcmread(file, stop_before_pixels=True)) for file in files]


def tilt(files: list[Path]) -> None:
    for number, file in enumerate(files):
        x, y, z = (float(value) for value in dcmread(file).ImagePositionPatient)
        edit(file, ImagePositionPatient=[x, y + 0.6 * number, z])


def spread(files: list[Path]) -> None:
    for file, place in zip(files, np.r_[0, np.cumsum(np.linspace(2.3, 2.7, len(files) - 1))], strict=True):
        x, y, _ = (float(value) for value in dcmread(file).ImagePositionPatient)
        edit(file, ImagePositionPatient=[x, y, round(float(place), 4)])


def fling(files: list[Path]) -> None:
    for number, file in enumerate(files):
        x, y, z = (float(value) for value in dcmread(file).ImagePositionPatient)
        edit(file, ImagePositionPatient=[x, y + 1e6 * number, z])


def add_scout(files: list[Path]) -> None:
    scout = Path(shutil.copy(files[0], files[0].with_name("scout.dcm")))
    edit(scout, SOPInstanceUID="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    files.append(scout)


def remove_one(files: list[Path]) -> None:
    del files[4]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), None),
        ((remove_one,), None),
        ((tilt,), Regular(11, "upright")),
        ((spread,), Regular(11, "resampled")),
        ((fling,), None),
        ((add_scout,), Regular(11, "1 left out")),
        ((tilt, add_scout), Regular(11, "upright, 1 left out")),
    ],
)
def test_series_that_viewers_cannot_show_has_one(make_series: Make, changes: tuple, expected: Regular | None) -> None:
    files = make_series("axial")
    for change in changes:
        change(files)
    metadata = told(files)
    assert regular_for(metadata, summarize(metadata[0])) == expected


def test_damaged_geometry_has_none(make_series: Make) -> None:
    metadata = told(make_series("axial"))
    summary = summarize(metadata[0])
    metadata[2]["00200032"] = {"vr": "DS", "Value": ["no number", None]}
    assert regular_for(metadata, summary) is None
    assert regular_for([], summary) is None


def test_series_that_cannot_be_described_has_none(make_series: Make) -> None:
    """A query lists all regular series: one that fails there would take the others with it."""
    files = make_series("axial")
    add_scout(files)
    metadata = told(files)
    summary = summarize(metadata[0]) | {"00200011": {"vr": "IS", "Value": [2**40]}}
    assert regular_for(metadata, summary) == Regular(11, "1 left out")
    assert describe_regular(summary, "1.2", "1 left out").SeriesNumber == 2**31 - 1
    assert regular_for(metadata, summary | {"00100010": {"vr": "PN", "Value": 3}}) is None


def test_regular_series_is_told_with_patient_and_study_of_its_source(make_series: Make) -> None:
    files = make_series("axial")
    edit(
        files[0],
        SeriesDescription="A description that is long enough to be cut, for a field of 64",
        AccessionNumber=None,
    )
    source = dcmread(files[0])
    found = describe_regular(summarize(to_json(source)), str(source.SeriesInstanceUID), "upright, 2 left out")
    assert (found.PatientID, found.StudyInstanceUID) == (source.PatientID, source.StudyInstanceUID)
    assert found.FrameOfReferenceUID == source.FrameOfReferenceUID, "voxels lie where the source's do"
    assert found.SeriesInstanceUID.startswith("2.25.") and found.AccessionNumber == ""
    assert found.SeriesDescription.endswith(" (regular: upright, 2 left out)")
    assert len(found.SeriesDescription) == 64
    assert (found.SeriesNumber, found.Modality) == (1001, "CT")
