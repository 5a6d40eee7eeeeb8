"""Properties of cases that only the datastore knows: their subject, and whether a person has corrected their label."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from lib.cases.labelled import Case
from lib.cases.split import subject_until


def subject_rule(datastore: Any, cases: Sequence[Case], separator: str) -> Callable[[str], str]:
    """The rule for the subject of a case: DICOM's PatientID, otherwise its id up to a separator.

    Args:
        datastore: MONAI Label's datastore.
        cases: the cases whose images are read for a PatientID.
        separator: if empty, each image without a PatientID is its own subject.
    """
    patients = {case.case_id: patient for case in cases if (patient := _patient_of(datastore, case))}
    by_name = subject_until(separator)
    return lambda case: f"patient {patients[case]}" if case in patients else by_name(case)


def corrected_ids(datastore: Any, case_ids: Iterable[str]) -> set[str]:
    """The cases whose label a person has changed; all of them if the datastore does not record this.

    Args:
        datastore: MONAI Label's datastore, with or without a label history.
        case_ids: labelled cases.
    """
    history = getattr(datastore, "history", None)
    latest = {} if history is None else {version.image_id: version for version in history.all_latest("final")}
    return {case for case in case_ids if case not in latest or latest[case].voxels_changed != 0}


def _patient_of(datastore: Any, case: Case) -> str:
    known = str(datastore.get_image_info(case.case_id).get("PatientID") or "")
    return known or (_patient_in(case.image) if case.image.is_dir() else "")


def _patient_in(folder: Path) -> str:
    """PatientID of the first instance in a folder; empty if there is none."""
    for path in sorted(folder.iterdir()):
        try:
            return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID", ""))
        except (InvalidDicomError, OSError):
            continue
    return ""
