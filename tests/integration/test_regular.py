"""DICOM series that viewers cannot show, by way of the regular series beside them: shown, segmented, and labelled."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_series import SeriesIdentity, write_series
from dicomweb_client import DICOMwebClient
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from synthetic_hippocampus import draw_cases

from lib.configs.catalogue import load_preset
from lib.dicom.presented.upright import UprightGrid
from lib.dicom.segmentation_reader import read_segmentation
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import Series, read_series
from tests.dicom.conftest import draw_mask, edit
from tests.integration.conftest import prepare
from tests.integration.hostile_prompts import check_prompts
from tests.integration.server import Server, parse_multipart, wait_until

KINDS = {
    "tilted": "upright",
    "doubled": "2 left out",
    "localizer": "1 left out",
    "growing": "resampled",
    "both": "upright, resampled, 1 left out",
}
SIDEWAYS_MM = 0.249
"""Between slices that are 1 mm apart: a gantry that is tilted by 14 degrees."""
PRESET = load_preset("hippocampus_mr")


def make_odd(folder: Path, kind: str) -> None:
    """Change a series of upright slices, 1 mm apart, into one that viewers cannot show."""
    files = sorted(folder.iterdir())
    growing = np.r_[0, np.cumsum(np.linspace(0.92, 1.08, len(files) - 1))]
    for number, file in enumerate(files):
        x, y, z = (float(value) for value in dcmread(file).ImagePositionPatient)
        if kind in ("growing", "both"):
            z += growing[number] - number
        if kind in ("tilted", "both"):
            y += SIDEWAYS_MM * (growing[number] if kind == "both" else number)
        edit(file, ImagePositionPatient=[round(x, 5), round(y, 5), round(z, 5)])
        if kind == "doubled" and number in (3, 4):
            content = dcmread(file)
            content.SOPInstanceUID = content.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            content.save_as(folder / f"again-{number}.dcm")
    if kind in ("localizer", "both"):
        scout = dcmread(files[0])
        scout.SOPInstanceUID = scout.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        scout.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        scout.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        scout.save_as(folder / "scout.dcm")


class Odd:
    """A server with a study of each kind, and two studies whose series have one UID."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.client = DICOMwebClient(f"{server.url}/dicom-web")
        cases = list(draw_cases(len(KINDS) + 2, seed=21))
        self.sources: dict[str, Series] = {}
        for number, kind in enumerate(KINDS):
            identity = SeriesIdentity(f"SYNTH-{kind}", "MR", f"T1 {kind}", number)
            write_series(server.studies / kind, cases[number].image, cases[number].affine_ras, identity)
            make_odd(server.studies / kind, kind)
            self.sources[kind] = read_series(sorted((server.studies / kind).iterdir()))
        self.twins = []
        uids: dict[str, str] = {}
        for number in (-2, -1):
            identity = SeriesIdentity(f"SYNTH-TWIN{-number}", "MR", "T1", 50 - number)
            place = server.studies / f"twin{3 + number}"
            files = write_series(place, cases[number].image, cases[number].affine_ras, identity)
            uids = uids or {"SeriesInstanceUID": str(dcmread(files[0]).SeriesInstanceUID)}
            for file in files:
                edit(file, **uids)
            self.twins.append(read_series(files))

    def study(self, kind: str) -> str:
        return str(self.sources[kind].header.StudyInstanceUID)

    def regular(self, kind: str) -> str:
        """The UID of the regular series of a kind."""
        found = self.client.search_for_series(self.study(kind), search_filters={"Modality": "MR"})
        (uid,) = {entry["0020000E"]["Value"][0] for entry in found} - {self.sources[kind].uid}
        return str(uid)

    def shown(self, kind: str) -> Series:
        """The regular series, as a client retrieves it."""
        folder = self.folder / f"shown-{kind}"
        if not folder.is_dir():
            folder.mkdir()
            for number, instance in enumerate(self.client.retrieve_series(self.study(kind), self.regular(kind))):
                instance.save_as(folder / f"{number}.dcm", write_like_original=False)
        return read_series(sorted(folder.iterdir()))

    def mask(self, image: str) -> nib.Nifti1Image:
        answer = self.server.infer("hippocampus_mr", image, result_extension=".nii.gz")
        assert answer.status_code == 200, answer.text
        return nib.Nifti1Image.from_bytes(gzip.decompress(parse_multipart(answer)["image"][1]))

    def label(self, image: str) -> np.ndarray:
        content = self.server.get("/datastore/label", params={"label": image, "tag": "final"}).content
        return np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Odd]:
    server = prepare(Server(tmp_path_factory.mktemp("odd"), {"models": "hippocampus_mr"}), {})
    made = Odd(server, tmp_path_factory.mktemp("retrieved"))
    server.start()
    wait_until(lambda: server.get("/datastore/").json()["total"] == len(KINDS) + 2)
    wait_until(lambda: len(made.client.search_for_series(made.study("both"))) == 2)
    yield made
    server.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_regular_series_is_listed_beside_its_source(odd: Odd, kind: str) -> None:
    (study,) = odd.client.search_for_studies(search_filters={"StudyInstanceUID": odd.study(kind)})
    assert study["00201206"]["Value"] == [2]
    (told,) = odd.client.search_for_series(odd.study(kind), search_filters={"SeriesInstanceUID": odd.regular(kind)})
    assert told["0008103E"]["Value"] == [f"T1 {kind} (regular: {KINDS[kind]})"]
    assert told["00201209"]["Value"] == [odd.sources[kind].shape[2]]
    metadata = odd.client.retrieve_series_metadata(odd.study(kind), odd.regular(kind))
    assert {tuple(one["00080008"]["Value"][:2]) for one in metadata} == {("DERIVED", "SECONDARY")}
    assert {one["00100020"]["Value"][0] for one in metadata} == {f"SYNTH-{kind}"}
    whole = odd.client.retrieve_study_metadata(odd.study(kind))
    series = [one["0020000E"]["Value"][0] for one in whole if one["00080060"]["Value"] == ["MR"]]
    files = len(list((odd.server.studies / kind).iterdir()))
    assert (series.count(odd.sources[kind].uid), series.count(odd.regular(kind))) == (files, len(metadata))


@pytest.mark.parametrize("kind", KINDS)
def test_regular_series_is_an_upright_even_stack_with_the_values_of_its_source(odd: Odd, kind: str) -> None:
    source, shown = odd.sources[kind], odd.shown(kind)
    assert (shown.notes, shown.even, shown.uid) == ((), None, odd.regular(kind))
    directions = shown.affine_lps[:3, :3] / np.linalg.norm(shown.affine_lps[:3, :3], axis=0)
    np.testing.assert_allclose(directions.T @ directions, np.eye(3), atol=1e-5)
    values = source.read_voxels()
    grid = UprightGrid.of(source.shape, source.affine_ras)
    assert grid.is_tilted == (kind in ("tilted", "both"))
    np.testing.assert_allclose(shown.affine_ras, grid.affine_ras, atol=1e-3)
    np.testing.assert_allclose(grid.to_file(shown.read_voxels()), values, atol=1e-4 * float(np.ptp(values)))
    first = shown.frames[0].header
    frame = odd.client.retrieve_instance_frames(odd.study(kind), shown.uid, first.SOPInstanceUID, [1])[0]
    assert frame == dcmread(shown.frames[0].file).PixelData[: len(frame)]


@pytest.mark.parametrize("kind", KINDS)
def test_inference_on_the_regular_series_is_that_of_its_source(odd: Odd, kind: str) -> None:
    source = odd.sources[kind]
    of_source, of_regular = odd.mask(source.uid), odd.mask(odd.regular(kind))
    np.testing.assert_allclose(of_source.affine, source.affine_ras, atol=1e-4)
    np.testing.assert_allclose(of_regular.affine, odd.shown(kind).affine_ras, atol=1e-3)
    grid = UprightGrid.of(source.shape, source.affine_ras)
    assert np.asarray(of_source.dataobj).any()
    np.testing.assert_array_equal(
        np.asarray(of_regular.dataobj), grid.to_series(np.asarray(of_source.dataobj)), err_msg="voxel for voxel"
    )
    warnings = odd.server.infer("hippocampus_mr", odd.regular(kind)).headers.get("X-Warnings", "")
    assert ("resampled" in warnings) == (source.even is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_of_the_regular_series_is_the_label_of_its_source(odd: Odd, kind: str) -> None:
    source, shown = odd.sources[kind], odd.shown(kind)
    grid = UprightGrid.of(source.shape, source.affine_ras)
    mask = draw_mask(source.shape, seed=4)
    seg = write_segmentation(np.asarray(grid.to_series(mask)), shown, PRESET, Origin("MANUAL", "", "anna"))
    odd.client.store_instances([seg])
    assert int((odd.label(source.uid) != mask).sum()) == 0
    beside = odd.client.search_for_series(odd.study(kind), search_filters={"Modality": "SEG"})
    kept = [odd.client.retrieve_series(odd.study(kind), one["0020000E"]["Value"][0])[0] for one in beside]
    by_series = {str(one.ReferencedSeriesSequence[0].SeriesInstanceUID): one for one in kept}
    assert set(by_series) == ({shown.uid} if source.even else {shown.uid, source.uid})
    np.testing.assert_array_equal(read_segmentation(by_series[shown.uid], shown).labels, grid.to_series(mask))
    if not source.even:
        np.testing.assert_array_equal(read_segmentation(by_series[source.uid], source).labels, mask)


@pytest.mark.parametrize("kind", KINDS)
def test_dicom_seg_refers_to_the_series_that_is_asked_for(odd: Odd, kind: str) -> None:
    source, shown = odd.sources[kind], odd.shown(kind)
    expected = np.asarray(odd.mask(source.uid).dataobj)
    grid = UprightGrid.of(source.shape, source.affine_ras)
    for series, mask in ((source, expected), (shown, grid.to_series(expected))):
        address = f"/infer/hippocampus_mr?image={series.uid}&output=dicom_seg"
        answer = odd.server.post(address, files={"params": (None, "{}")})
        assert answer.status_code == 200, answer.text
        seg = dcmread(io.BytesIO(answer.content))
        refers_to = source if series is source and not source.even else shown
        assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == refers_to.uid
        expected_there = mask if refers_to is series else grid.to_series(mask)
        np.testing.assert_array_equal(read_segmentation(seg, refers_to).labels, expected_there)


def test_clicks_on_a_tilted_series_and_on_its_regular_one_change_the_clicked_label_alone(
    odd: Odd, tmp_path: Path
) -> None:
    for image in (odd.sources["tilted"].uid, odd.regular("tilted")):
        check_prompts(odd.server, "hippocampus_mr_edit", {"image": image}, {"anterior": 1, "posterior": 2}, tmp_path)


def test_viewer_is_told_to_open_the_regular_series(odd: Odd) -> None:
    told = odd.server.get("/ohif/series", params={"study": odd.study("tilted")}).json()
    assert told["SeriesInstanceUID"] == odd.regular("tilted")
    assert told["regular"] == {odd.sources["tilted"].uid: "T1 tilted (regular: upright)"}
    page = odd.server.get(f"/case/{odd.sources['tilted'].uid}").text
    assert f"SeriesInstanceUIDs={odd.regular('tilted')}" in page


def test_label_in_nifti_lands_with_the_source(odd: Odd, tmp_path: Path) -> None:
    """As OHIF's Submit sends it: on the grid of the series that it shows."""
    source, shown = odd.sources["tilted"], odd.shown("tilted")
    mask = draw_mask(source.shape, seed=9)
    grid = UprightGrid.of(source.shape, source.affine_ras)
    nib.save(nib.Nifti1Image(np.asarray(grid.to_series(mask)), shown.affine_ras), tmp_path / "label.nii.gz")
    answer = odd.server.save_label(shown.uid, (tmp_path / "label.nii.gz").read_bytes(), ["anterior", "posterior"])
    assert (answer.status_code, answer.json()["image"]) == (200, source.uid)
    np.testing.assert_array_equal(odd.label(source.uid), mask)


def test_uneven_slices_take_no_segmentation_of_their_own(odd: Odd) -> None:
    source = odd.sources["growing"]
    even = Series(source.frames)
    seg = write_segmentation(draw_mask(even.shape), even, PRESET, Origin("MANUAL", "", "anna"))
    failed = refused(odd, seg)
    assert "unevenly spaced slices" in failed


def refused(odd: Odd, seg: Dataset) -> str:
    """The sentence with which a SEG is not stored."""
    packed = io.BytesIO()
    seg.save_as(packed, write_like_original=False)
    body = b"--b\r\nContent-Type: application/dicom\r\n\r\n" + packed.getvalue() + b"\r\n--b--\r\n"
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=b'}
    answer = odd.server.post("/dicom-web/studies", data=body, headers=headers)
    assert answer.status_code == 409
    return answer.text


def test_series_of_one_uid_in_two_studies_are_two_images(odd: Odd) -> None:
    """Each has its own voxels, mask and label, under the UID that a client sees in its study."""
    uids = []
    for series in odd.twins:
        study = str(series.header.StudyInstanceUID)
        (told,) = odd.client.search_for_series(study)
        uid = told["0020000E"]["Value"][0]
        uids.append(uid)
        for instance in odd.client.retrieve_series(study, uid):
            assert instance.SeriesInstanceUID == uid
        np.testing.assert_allclose(odd.mask(uid).affine, series.affine_ras, atol=1e-4)
        mask = draw_mask(series.shape, seed=len(uids))
        odd.client.store_instances([write_segmentation(mask, series, PRESET, Origin("MANUAL", "", "anna"))])
        np.testing.assert_array_equal(odd.label(uid), mask)
    assert uids[0] == odd.twins[0].uid and uids[1] != uids[0]
    assert (odd.label(uids[0]) != draw_mask(odd.twins[0].shape, seed=1)).sum() == 0, "it has kept its own label"
    problems = odd.server.get("/datastore/").json()["dicom"]["problems"]
    assert list(problems) == ["twin2/0001.dcm"] and uids[1] in problems["twin2/0001.dcm"]
