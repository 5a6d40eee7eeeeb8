"""Images that cannot be segmented are never handed out, are told on the page, and come back when they are mended.

No server is started.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase, draw_cases

from tests.server.clinic import MODEL, Clinic, encode, put_cases

BROKEN = ("constant", "damaged", "nan", "thin")


@pytest.fixture(scope="module")
def cases() -> dict[str, SyntheticCase]:
    return {f"case_{number}": case for number, case in enumerate(draw_cases(3, seed=7))}


@pytest.fixture
def broken(tmp_path: Path, cases: dict[str, SyntheticCase]) -> Iterator[Clinic]:
    """One good case among broken ones."""
    clinic = Clinic(tmp_path)
    put_cases(clinic.studies, {"case_0": cases["case_0"]})
    image, affine = cases["case_0"].image.astype(np.float32), cases["case_0"].affine_ras
    with_nan = image.copy()
    with_nan[5, 5, 5] = np.nan
    faults = {"constant": np.full_like(image, 7), "nan": with_nan, "thin": image[:, :, :3]}
    for name, voxels in faults.items():
        nib.save(nib.Nifti1Image(voxels, affine), clinic.studies / f"{name}.nii.gz")
    good = (clinic.studies / "case_0.nii.gz").read_bytes()
    (clinic.studies / "damaged.nii.gz").write_bytes(good[: len(good) // 2])
    (clinic.studies / "x.seg.nrrd").write_bytes(b"NRRD0004\n")
    yield clinic.open()
    clinic.store.close()


def _next(clinic: Clinic, client: str) -> str | None:
    answer = clinic.post("/activelearning/random", json={"client_id": client})
    assert answer.status_code == 200
    return answer.json().get("id")


def test_broken_images_are_left_out_told_and_come_back(
    broken: Clinic, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    assert [_next(broken, client) for client in ("anna", "bert", "carl")] == ["case_0", None, None]
    told = broken.get("/datastore/problems").json()
    assert sorted(told["left_out"][MODEL]) == list(BROKEN)
    assert [file["name"] for file in told["files"]] == ["x.seg.nrrd"]
    page = broken.get("/").text
    assert all(f"{name}.nii.gz" in page for name in BROKEN) and "x.seg.nrrd" in page and "Try again" in page
    again = broken.post("/datastore/image/check", params={"image": "constant"}).json()
    assert "constant" in again["checks"][MODEL]["problem"]
    assert _next(broken, "bert") is None
    good = encode(cases["case_1"].image, cases["case_1"].affine_ras, tmp_path)
    (broken.studies / "damaged.nii.gz").write_bytes(good)
    broken.store.refresh()  # as the watched folder does
    assert _next(broken, "bert") == "damaged"


@pytest.mark.parametrize("name", BROKEN)
def test_uploads_that_no_model_can_segment_are_refused(broken: Clinic, name: str) -> None:
    file = {"file": (f"{name}.nii.gz", (broken.studies / f"{name}.nii.gz").read_bytes())}
    answer = broken.put("/datastore/", params={"image": f"new_{name}"}, files=file)
    assert answer.status_code == 422, answer.text
    assert broken.put("/session/", files={"files": file["file"]}).status_code == 422


def test_upload_under_slicers_name_is_kept_under_a_safe_id_and_found_by_both(
    broken: Clinic, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    content = encode(cases["case_2"].image, cases["case_2"].affine_ras, tmp_path)
    name = "3: AX T1 POST"
    answer = broken.put("/datastore/", params={"image": name}, files={"file": ("v.nii.gz", content)})
    assert (answer.status_code, answer.json()["image"]) == (200, "3_AX_T1_POST")
    for image in (name, "3_AX_T1_POST"):
        assert broken.post(f"/infer/{MODEL}", params={"image": image}).status_code == 200
    label = encode(np.zeros_like(cases["case_2"].label), cases["case_2"].affine_ras, tmp_path)
    sent = {"params": (None, "{}"), "label": ("/home/anna/label.nii.gz", label, "application/gzip")}
    saved = broken.put("/datastore/label", params={"image": name}, files=sent)
    assert (saved.status_code, saved.json()["image"]) == (200, "3_AX_T1_POST")
