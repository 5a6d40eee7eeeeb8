"""What the datastore knows of cases besides their files: whose they are, and whether a person has corrected them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError

from lib.cases.labelled import Case
from lib.cases.split import subject_until


def subject_rule(datastore: Any, cases: Sequence[Case], separator: str) -> Callable[[str], str]:
    """The rule that names a case's subject: DICOM's PatientID, else its id up to a separator.

    Args:
        datastore: MONAI Label's.
        cases: those whose images can be asked.
        separator: empty: each image without a PatientID is a subject of its own.
    """
    patients = {case.case_id: patient for case in cases if (patient := _patient_of(datastore, case))}
    by_name = subject_until(separator)
    return lambda case: f"patient {patients[case]}" if case in patients else by_name(case)


def corrected_ids(datastore: Any, case_ids: Iterable[str]) -> set[str]:
    """Those whose label a person has changed; where the datastore does not know, all of them.

    Args:
        datastore: MONAI Label's, with a history of labels or without.
        case_ids: labelled cases.
    """
    history = getattr(datastore, "history", None)
    latest = {} if history is None else {version.image_id: version for version in history.all_latest("final")}
    return {case for case in case_ids if case not in latest or latest[case].voxels_changed != 0}


def _patient_of(datastore: Any, case: Case) -> str:
    known = str(datastore.get_image_info(case.case_id).get("PatientID") or "")
    return known or (_patient_in(case.image) if case.image.is_dir() else "")


def _patient_in(folder: Path) -> str:
    """PatientID of the first instance in a folder; empty where there is none."""
    for path in sorted(folder.iterdir()):
        try:
            return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID", ""))
        except (InvalidDicomError, OSError):
            continue
    return ""
