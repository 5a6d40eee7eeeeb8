"""NIfTI and NRRD cases in a DICOMweb viewer: found, shown, segmented, corrected, and labelled on their own grid."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import nibabel as nib
import numpy as np
import pytest
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom import dcmread
from synthetic_hippocampus import SyntheticCase

from lib.configs.catalogue import load_preset
from lib.dicom.presented.grid import SeriesGrid
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import read_series
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, parse_multipart, read_nrrd
from tests.tiny import axis_affine, oblique_affine

SHEARED = np.array([[1, 0, 0.3, 0], [0, 1, 0.2, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
GRIDS = {
    "LAS": axis_affine("LAS", (1, 1, 1), (20, -30, 10)),
    "RPI": axis_affine("RPI", (1, 1, 1)),
    "oblique": oblique_affine("RAS"),
    "anisotropic": axis_affine("LPS", (0.8, 0.8, 2.0)),
    "sheared": SHEARED,
    "four": axis_affine("RAS"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server whose studies are NIfTI on all kinds of grids."""
    server = prepare(Server(tmp_path_factory.mktemp("files"), {"models": "hippocampus_mr"}), {})
    image = cases["case_0"].image
    for name, affine in GRIDS.items():
        voxels = image[..., None] if name == "four" else image
        nib.save(nib.Nifti1Image(voxels, affine), server.studies / f"{name}.nii.gz")
    yield server.start()
    server.stop()


def _client(server: Server) -> DICOMwebClient:
    return DICOMwebClient(f"{server.url}/dicom-web")


def _found(server: Server) -> dict[str, dict]:
    return {study["00100020"]["Value"][0]: study for study in _client(server).search_for_studies()}


def test_every_file_is_a_study_of_its_name(files: Server) -> None:
    found = _found(files)
    assert set(found) == set(GRIDS)
    assert found["LAS"]["00081030"]["Value"] == ["LAS"]
    assert not any((files.studies / ".dicom").rglob("*.dcm"))


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "sheared"])
def test_series_has_the_values_and_places_of_the_file_and_a_seg_comes_back_on_its_grid(
    files: Server, cases: dict[str, SyntheticCase], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    client, folder = _client(files), tmp_path_factory.mktemp("retrieved")
    study = _found(files)[name]["0020000D"]["Value"][0]
    uid = client.search_for_series(study)[0]["0020000E"]["Value"][0]
    instances = client.retrieve_series(study, uid)
    for number, instance in enumerate(instances):
        instance.save_as(folder / f"{number}.dcm", write_like_original=False)
    assert len(client.retrieve_series_metadata(study, uid)) == len(instances)
    sop = instances[0].SOPInstanceUID
    frame = client.retrieve_instance_frames(study, uid, sop, [1])[0]
    assert frame == instances[0].PixelData[: len(frame)]
    place = f"{files.url}/dicom-web/studies/{study}/series/{uid}/instances/{sop}"
    assert client.retrieve_bulkdata(f"{place}/frames/1") == list(client.iter_instance_frames(study, uid, sop, [1]))
    picture = client.retrieve_instance_rendered(study, uid, sop, media_types=("image/png",))
    assert Image.open(io.BytesIO(picture)).size == (instances[0].Columns, instances[0].Rows)
    series = read_series(sorted(folder.glob("*.dcm")))
    image, affine = cases["case_0"].image, GRIDS[name]
    to_file = np.linalg.inv(affine) @ series.affine_ras
    voxels = series.read_voxels()
    indices = np.stack(np.meshgrid(*map(np.arange, series.shape), indexing="ij")).reshape(3, -1)
    there = np.rint(to_file[:3, :3] @ indices + to_file[:3, 3:]).astype(int)
    np.testing.assert_allclose(
        voxels.ravel(), image[tuple(there)], atol=1e-4 * float(np.ptp(image)), err_msg="values at their places"
    )
    mask = np.zeros(series.shape, dtype=np.uint8)
    mask.ravel()[:] = cases["case_0"].label[tuple(there)]
    seg = write_segmentation(mask, series, load_preset("hippocampus_mr"), Origin("MANUAL", "", "anna"))
    packed = io.BytesIO()
    seg.save_as(packed, write_like_original=False)
    packed.seek(0)
    client.store_instances([dcmread(packed)])
    kept = files.get("/datastore/label", params={"label": name, "tag": "final"}).content
    (folder / "kept.nii.gz").write_bytes(kept)
    label = nib.load(folder / "kept.nii.gz")
    assert int((np.asarray(label.dataobj) != cases["case_0"].label).sum()) == 0
    np.testing.assert_allclose(label.affine, affine, atol=1e-5)


def test_inference_by_series_is_ordered_as_the_viewer_orders_it(files: Server, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("masks")
    study = _found(files)["LAS"]["0020000D"]["Value"][0]
    uid = _client(files).search_for_series(study)[0]["0020000E"]["Value"][0]
    by_series = read_nrrd(parse_multipart(files.infer("hippocampus_mr", uid))["image"][1], folder)[0]
    by_case = read_nrrd(parse_multipart(files.infer("hippocampus_mr", "LAS"))["image"][1], folder)[0]
    assert by_case.any()
    np.testing.assert_array_equal(by_series, by_case[:, ::-1, :])  # LAS to LPS


def test_label_is_submitted_and_read_under_the_series_of_its_file(files: Server, cases, tmp_path) -> None:
    """As OHIF's Submit does, which knows no other name of the case."""
    study = _found(files)["anisotropic"]["0020000D"]["Value"][0]
    uid = _client(files).search_for_series(study)[0]["0020000E"]["Value"][0]
    nib.save(nib.Nifti1Image(cases["case_0"].label.astype(np.uint8), GRIDS["anisotropic"]), tmp_path / "label.nii.gz")
    answer = files.save_label(uid, (tmp_path / "label.nii.gz").read_bytes(), ["anterior", "posterior"])
    assert (answer.status_code, answer.json()["image"]) == (200, "anisotropic")
    versions = files.get("/datastore/label/versions", params={"image": uid}).json()
    assert versions[0]["version_id"] == answer.json()["version"]
    assert files.save_label("2.25.1", b"", ["anterior"]).status_code == 404


def _series_of(server: Server, name: str) -> tuple[str, SeriesGrid]:
    """The series of a case and its grid."""
    study = _found(server)[name]["0020000D"]["Value"][0]
    uid = _client(server).search_for_series(study)[0]["0020000E"]["Value"][0]
    return uid, SeriesGrid.of(nib.load(server.studies / f"{name}.nii.gz").shape[:3], GRIDS[name])


@pytest.mark.parametrize("name", ["RPI", "sheared"])
def test_click_on_a_series_is_obeyed_at_its_place_in_the_file(files: Server, name: str, tmp_path) -> None:
    uid, grid = _series_of(files, name)
    point, masks = [5, 7, 9], []
    sent = {"result_extension": ".nrrd", "anterior": [point], "background": [], "all_labels": True}
    for image, at in ((uid, point), (name, [int(value) for value in grid.index_in_file(point)])):
        params = {"params": json.dumps(sent | {"anterior": [at]})}
        answer = files.post("/infer/hippocampus_mr_edit", params={"image": image}, data=params)
        assert answer.status_code == 200, answer.text
        masks.append(read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0])
        assert masks[-1][tuple(at)] == 1
    np.testing.assert_array_equal(grid.to_file(masks[0]), masks[1])


@pytest.mark.parametrize("name", ["RPI", "sheared"])
def test_scribbles_on_a_series_come_back_on_it(files: Server, cases, name: str, tmp_path) -> None:
    uid, grid = _series_of(files, name)
    drawing = cases["case_0"].label.astype(np.uint8)
    drawing[2, 3, 4:9] = 4
    drawing[12, 3, 4:9] = 3
    names = ("anterior", "posterior", "background_scribbles", "foreground_scribbles")
    label_info = [{"name": label, "id": number} for number, label in enumerate(names, start=1)]
    params = {"label_info": label_info, "selected_label_name": "anterior", "result_extension": ".nrrd"}
    series_drawing = np.ascontiguousarray(grid.to_series(drawing))
    masks = []
    for image, voxels, affine in ((uid, series_drawing, grid.affine_ras), (name, drawing, GRIDS[name])):
        answer = files.post(
            "/infer/hippocampus_mr_scribbles",
            params={"image": image},
            data={"params": json.dumps(params)},
            files={"label": ("scribbles.nii.gz", encode(voxels, affine, tmp_path))},
        )
        assert answer.status_code == 200, answer.text
        masks.append(read_nrrd(parse_multipart(answer)["image"][1], tmp_path)[0])
    assert masks[1][2, 3, 4:9].all() and not masks[1][12, 3, 4:9].any()
    np.testing.assert_array_equal(grid.to_file(masks[0]), masks[1])


def test_newest_label_is_a_seg_beside_the_series_of_its_file(files: Server, cases, tmp_path) -> None:
    label = cases["case_0"].label.astype(np.uint8)
    nib.save(nib.Nifti1Image(label, GRIDS["four"]), tmp_path / "label.nii.gz")
    client, study = _client(files), _found(files)["four"]["0020000D"]["Value"][0]
    uids = []
    for _ in range(2):
        answer = files.save_label("four", (tmp_path / "label.nii.gz").read_bytes(), ["anterior", "posterior"])
        assert answer.status_code == 200
        (listed,) = client.search_for_series(study, search_filters={"Modality": "SEG"})
        uids.append(listed["0020000E"]["Value"][0])
    assert uids[0] != uids[1]
    (seg,) = client.retrieve_series(study, uids[1])
    assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["anterior", "posterior"]
    assert int(seg.pixel_array.sum()) == int((label > 0).sum())
    (told,) = client.retrieve_series_metadata(study, uids[1])
    assert told["00080018"]["Value"] == [seg.SOPInstanceUID]
    frame = client.retrieve_instance_frames(study, uids[1], seg.SOPInstanceUID, [1])[0]
    bits = np.unpackbits(np.frombuffer(frame, np.uint8), bitorder="little")[: seg.Rows * seg.Columns]
    np.testing.assert_array_equal(bits.reshape(seg.Rows, seg.Columns), seg.pixel_array[0])
    assert "SEG" in {one["00080060"]["Value"][0] for one in client.retrieve_study_metadata(study)}
    place = f"/dicom-web/studies/{study}/series"
    assert files.get(f"{place}/{uids[0]}/metadata").status_code == 404, "a newer one has taken its place"
    assert files.get(f"{place}/{uids[1]}/instances/{seg.SOPInstanceUID}/frames/9999").status_code == 400
    assert files.infer("hippocampus_mr", uids[1]).status_code == 404


def test_next_sample_in_ohif_and_the_page_name_the_study_of_a_file(files: Server) -> None:
    for name in GRIDS:
        files.delete("/datastore/label", params={"id": name, "tag": "final"})
    asked = {"Referer": f"{files.url}/ohif/monai-label?StudyInstanceUIDs=1.2"}
    chosen = files.post("/activelearning/first", json={"client_id": "viewer"}, headers=asked).json()
    study = _found(files)[chosen["id"]]["0020000D"]["Value"][0]
    assert chosen["StudyInstanceUID"] == study
    assert f"/ohif/monai-label?StudyInstanceUIDs={study}" in files.get(f"/case/{chosen['id']}").text


def test_pictures_and_wrong_addresses(files: Server) -> None:
    study = _found(files)["oblique"]["0020000D"]["Value"][0]
    picture = files.get(f"/dicom-web/studies/{study}/thumbnail", headers={"Accept": "image/png"})
    assert (picture.status_code, picture.content[:4]) == (200, b"\x89PNG")
    assert files.get(f"/dicom-web/studies/{study}/series/2.25.1/metadata").status_code == 404
    assert files.get("/dicom-web/studies/2.25.1/metadata").status_code == 404


def test_dicom_seg_of_a_file_refers_to_its_series_and_comes_back_as_the_same_mask(files: Server, tmp_path) -> None:
    found = _found(files)["RPI"]["0020000D"]["Value"][0]
    uid = _client(files).search_for_series(found)[0]["0020000E"]["Value"][0]
    for image in ("RPI", uid):
        answer = files.post("/infer/hippocampus_mr", params={"image": image, "output": "dicom_seg"})
        assert answer.status_code == 200, answer.text
        seg = dcmread(io.BytesIO(answer.content))
        assert (seg.Modality, seg.StudyInstanceUID) == ("SEG", found)
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == uid
        made_by = seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion
        engine = json.loads(parse_multipart(files.infer("hippocampus_mr", image))["params"][1])["engine"]
        assert "pytorch" in engine and seg.SoftwareVersions == made_by == f"shipped ({engine})"
    _client(files).store_instances([seg])
    (tmp_path / "kept.nii.gz").write_bytes(files.get("/datastore/label", params={"label": "RPI"}).content)
    mask = read_nrrd(parse_multipart(files.infer("hippocampus_mr", "RPI"))["image"][1], tmp_path)[0]
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "kept.nii.gz").dataobj), mask)


WRONG = [
    "studies/{study}/series/{other}/metadata",
    "studies/{study}/series/{series}/instances/{other_sop}/frames/1",
    "studies/{study}/series/{series}/instances/{sop}/frames/2",
    "studies/{study}/series/{series}/instances/{sop}/frames/0",
    "studies/{study}/series/{series}/instances/{sop}/frames/99999999999999999999",
    "studies/{study}/series/{series}/instances/{sop}/frames/-1",
    "studies/{study}/series/..%2f..%2fmetadata",
    "studies/{study}/../../etc/passwd",
    "studies?limit=-1",
    "studies?limit=1.5",
    "studies?limit=99999999999999999999",
    "studies?offset=abc",
    "studies/{study}/series?limit=-5",
]


@pytest.mark.parametrize("path", WRONG)
def test_wrong_address_of_a_presented_series_is_refused(files: Server, path: str) -> None:
    found = _found(files)
    study, other_study = (found[name]["0020000D"]["Value"][0] for name in ("LAS", "RPI"))
    client = _client(files)
    series, other = (client.search_for_series(uid)[0]["0020000E"]["Value"][0] for uid in (study, other_study))
    sop, other_sop = (
        client.retrieve_series_metadata(*uids)[0]["00080018"]["Value"][0]
        for uids in ((study, series), (other_study, other))
    )
    names = {"study": study, "series": series, "other": other, "sop": sop, "other_sop": other_sop}
    assert 400 <= files.get(f"/dicom-web/{path.format(**names)}").status_code < 500
