"""What 3D Slicer's MONAI Label client does in a session, over plain HTTP against the real server."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from synthetic_hippocampus import SyntheticCase

from lib.cases.metrics import dice_per_label, mean_known
from tests.integration.conftest import encode
from tests.integration.server import Server, parse_multipart, read_nrrd

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0])


def mean_dice(mask: np.ndarray, reference: np.ndarray) -> float:
    return mean_known(dice_per_label(mask, reference, {"anterior": 1, "posterior": 2}).values())


def test_info_lists_models_trainers_labels_and_strategies(server: Server) -> None:
    info = server.get("/info/").json()
    assert info["models"]["hippocampus_mr"]["labels"] == {"anterior": 1, "posterior": 2}
    assert "tiny" not in info["models"], "a model without weights must not be offered"
    assert set(info["trainers"]) == {"hippocampus_mr", "tiny"}
    assert {"random", "first"} <= set(info["strategies"])
    assert info["models"]["tiny_edit"]["type"] == "deepedit", "drawing from nothing needs no weights"
    assert info["models"]["hippocampus_mr_scribbles"]["type"] == "scribbles"
    assert info["labels"] == ["anterior", "posterior", "Left Box", "core", "background"]


def test_address_without_slash_is_redirected(server: Server) -> None:
    answer = server.get("/info", allow_redirects=False)
    assert answer.status_code == 307
    assert answer.headers["location"].endswith("/info/")


def test_next_sample_is_an_unlabelled_study(server: Server, cases: dict[str, SyntheticCase]) -> None:
    sample = server.post("/activelearning/random", json={"client_id": "tester"}).json()
    assert sample["id"] in cases
    assert Path(sample["path"]) == server.studies / f"{sample['id']}.nii.gz"
    assert sample["name"] == f"{sample['id']}.nii.gz"
    assert sample["strategy"]["random"]["client_id"] == "tester"


def test_segmentation_lies_on_the_image_and_is_right(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    answer = server.infer("hippocampus_mr", "case_0")
    assert answer.status_code == 200
    parts = parse_multipart(answer)
    assert list(parts) == ["params", "image"]
    mask, header = read_nrrd(parts["image"][1], tmp_path)
    case = cases["case_0"]
    assert mask.shape == case.image.shape and mask.dtype == np.uint8
    np.testing.assert_allclose(header["space origin"], RAS_TO_LPS @ case.affine_ras[:3, 3], atol=1e-5)
    np.testing.assert_allclose(header["space directions"].T, RAS_TO_LPS @ case.affine_ras[:3, :3], atol=1e-5)
    assert mean_dice(mask, case.label) > 0.8
    said = json.loads(parts["params"][1])
    assert said["label_names"] == {"anterior": 1, "posterior": 2}
    assert said["model"]["origin"] == "shipped"
    assert set(said["latencies"]) >= {"pre", "infer", "total"}


def test_uploaded_file_is_segmented_as_the_study_is(server: Server, tmp_path: Path) -> None:
    image = (server.studies / "case_1.nii.gz").read_bytes()
    files = {"params": (None, '{"result_extension": ".nrrd"}'), "file": ("/home/anna/scan 1.nii.gz", image)}
    uploaded = server.post("/infer/hippocampus_mr?image=", files=files)
    study = server.infer("hippocampus_mr", "case_1")
    masks = [read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0] for answer in (uploaded, study)]
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("extension", [".nii.gz", ".nii", ".nrrd", ".seg.nrrd"])
def test_output_image_is_the_mask_alone(server: Server, extension: str) -> None:
    form = {"params": json.dumps({"result_extension": extension})}
    answer = server.post("/infer/hippocampus_mr?image=case_0&output=image", data=form)
    assert answer.headers["content-disposition"].endswith(f'{extension}"')
    start = {".nii.gz": b"\x1f\x8b", ".nii": b"\x5c\x01"}.get(extension, b"NRRD")
    assert answer.content.startswith(start)


def test_output_json_is_the_json_alone(server: Server) -> None:
    said = server.post("/infer/hippocampus_mr?image=case_0&output=json").json()
    assert said["label_statistics"]["anterior"]["voxels"] > 500


def test_submitted_label_is_kept_voxel_for_voxel(
    server: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_2"]
    label = encode(case.label, case.affine_ras, tmp_path)
    answer = server.save_label("case_2", label, ["anterior", "posterior"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["image"] == "case_2"
    fetched = server.get("/datastore/label?label=case_2&tag=final").content
    kept = nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(fetched)))
    np.testing.assert_array_equal(np.asarray(kept.dataobj), case.label)
    assert server.request("HEAD", "/datastore/label?image=case_2&tag=final").status_code == 200
    assert server.get("/datastore/label/info?label=case_2&tag=final").json()["client_id"] == "tester"
    assert server.get("/datastore/").json()["completed"] >= 1
