"""Labels that somebody puts beside the images by hand; no server is started."""

from __future__ import annotations

import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import draw_cases

from tests.server.clinic import Clinic, put_cases


def test_label_put_there_by_hand_that_does_not_fit_is_told_and_its_case_stays_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clinic, cases = Clinic(tmp_path), {f"case_{number}": case for number, case in enumerate(draw_cases(5, seed=7))}
    put_cases(clinic.studies, cases)
    final = clinic.studies / "labels" / "final"
    final.mkdir(parents=True)
    for name, case in cases.items():
        label = case.label[:-1] if name == "case_3" else case.label.astype(np.float64)
        nib.save(nib.Nifti1Image(label, case.affine_ras), final / f"{name}.nii.gz")
    with caplog.at_level(logging.INFO):
        clinic.open()
    try:
        told = clinic.get("/datastore/").json()
        assert (told["total"], told["completed"]) == (5, 4)
        assert [problem["file"] for problem in told["label_problems"]] == ["labels/final/case_3.nii.gz"]
        page = clinic.get("/").text
        assert "labels/final/case_3.nii.gz" in page and "valid: its image" in page
        assert "labels/final/case_3.nii.gz is left out" in caplog.text
        assert clinic.post("/activelearning/first", json={}).json()["id"] == "case_3"
    finally:
        clinic.store.close()
