"""Images that cannot be segmented are never handed out, are told on the page, and come back when they are mended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, wait_until

BROKEN = ("constant", "damaged", "nan", "thin")


@pytest.fixture(scope="module")
def broken_server(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """One good case among broken ones."""
    server = prepare(
        Server(tmp_path_factory.mktemp("broken"), {"models": "hippocampus_mr"}), dict([*cases.items()][:1])
    )
    image, affine = cases["case_0"].image.astype(np.float32), cases["case_0"].affine_ras
    with_nan = image.copy()
    with_nan[5, 5, 5] = np.nan
    faults = {"constant": np.full_like(image, 7), "nan": with_nan, "thin": image[:, :, :3]}
    for name, voxels in faults.items():
        nib.save(nib.Nifti1Image(voxels, affine), server.studies / f"{name}.nii.gz")
    good = (server.studies / "case_0.nii.gz").read_bytes()
    (server.studies / "damaged.nii.gz").write_bytes(good[: len(good) // 2])
    (server.studies / "x.seg.nrrd").write_bytes(b"NRRD0004\n")
    yield server.start()
    server.stop()


def _next(server: Server, client: str) -> str | None:
    answer = server.post("/activelearning/random", json={"client_id": client})
    assert answer.status_code == 200
    return answer.json().get("id")


def test_broken_images_are_left_out_told_and_come_back(
    broken_server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    server = broken_server
    assert [_next(server, client) for client in ("anna", "bert", "carl")] == ["case_0", None, None]
    told = server.get("/datastore/problems").json()
    assert sorted(told["left_out"]["hippocampus_mr"]) == list(BROKEN)
    assert [file["name"] for file in told["files"]] == ["x.seg.nrrd"]
    page = server.get("/").text
    assert all(f"{name}.nii.gz" in page for name in BROKEN) and "x.seg.nrrd" in page and "Try again" in page
    again = server.post("/datastore/image/check", params={"image": "constant"}).json()
    assert "constant" in again["checks"]["hippocampus_mr"]["problem"]
    assert _next(server, "bert") is None
    good = encode(cases["case_1"].image, cases["case_1"].affine_ras, tmp_path)
    (server.studies / "damaged.nii.gz").write_bytes(good)
    wait_until(lambda: _next(server, "bert") == "damaged", 20)


@pytest.mark.parametrize("name", BROKEN)
def test_uploads_that_no_model_can_segment_are_refused(broken_server: Server, name: str) -> None:
    file = {"file": (f"{name}.nii.gz", (broken_server.studies / f"{name}.nii.gz").read_bytes())}
    if name == "damaged":  # the other test mends that file
        file = {"file": ("damaged.nii.gz", file["file"][1][:500])}
    answer = broken_server.put("/datastore/", params={"image": f"new_{name}"}, files=file)
    assert answer.status_code == 422, answer.text
    assert broken_server.put("/session/", files={"files": file["file"]}).status_code == 422


def test_upload_under_slicers_name_is_kept_under_a_safe_id_and_found_by_both(
    broken_server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    content = encode(cases["case_2"].image, cases["case_2"].affine_ras, tmp_path)
    name = "3: AX T1 POST"
    answer = broken_server.put("/datastore/", params={"image": name}, files={"file": ("v.nii.gz", content)})
    assert (answer.status_code, answer.json()["image"]) == (200, "3_AX_T1_POST")
    for image in (name, "3_AX_T1_POST"):
        assert broken_server.infer("hippocampus_mr", image).status_code == 200
    label = encode(np.zeros_like(cases["case_2"].label), cases["case_2"].affine_ras, tmp_path)
    saved = broken_server.save_label(name, label, [])
    assert (saved.status_code, saved.json()["image"]) == (200, "3_AX_T1_POST")
