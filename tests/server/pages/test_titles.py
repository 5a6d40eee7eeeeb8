"""What cases are called on the pages."""

from __future__ import annotations

import pytest

from lib.dicom.attributes import element
from lib.dicom.sources import series_info
from lib.server.pages.titles import Title, person, title_of

SERIES = (
    element("SeriesInstanceUID", "1.2.3")
    | element("PatientName", {"Alphabetic": "Yamada^Tarou", "Ideographic": "山田^太郎"})
    | element("PatientID", "P7")
    | element("StudyDescription", "Hippocampus")
    | element("StudyDate", "20260131")
    | element("SeriesDescription", "T1")
)


def test_title_of_a_series_has_patient_study_date_and_series() -> None:
    told = title_of("1.2.3", series_info(SERIES))
    assert told == Title("Yamada, Tarou P7, Hippocampus, 2026-01-31, T1", "1.2.3")


def test_title_of_a_series_without_attributes_is_its_uid() -> None:
    assert title_of("1.2.3", series_info(element("SeriesInstanceUID", "1.2.3"))) == Title("1.2.3")
    assert title_of("case_1", None) == Title("case_1")


def test_patients_name_is_shown_and_not_kept_with_the_image() -> None:
    assert "PatientName" not in series_info(SERIES).attributes


@pytest.mark.parametrize(
    ("name", "written"), [("Doe^John^A^Dr^MD", "Doe, Dr John A MD"), ("Doe", "Doe"), ("", ""), ("^John", "John")]
)
def test_person_as_people_write_it(name: str, written: str) -> None:
    assert person(name) == written
