"""DICOMweb over a folder of studies, asked by dicomweb-client as any other server."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gdcm
import nibabel as nib
import numpy as np
import pytest
import requests
from dicom_series import SeriesIdentity, write_series
from dicomweb_client import DICOMwebClient
from PIL import Image
from pydicom import dcmread
from pydicom.uid import generate_uid
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.cluster.cli import main as segment
from lib.configs.catalogue import load_preset
from lib.dicom.segmentation_reader import read_segmentation
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import Series, read_series
from lib.transforms.volume import read_volume
from tests.dicom.conftest import draw_mask, edit, transcode
from tests.dicom.test_segmentation import fill_uids
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, parse_multipart, wait_until

JPEG_2000 = "1.2.840.10008.1.2.4.90"
EXPLICIT = "1.2.840.10008.1.2.1"


class Studies:
    """A server with three patients' DICOM series (axial; sagittal; JPEG 2000) and a NIfTI file beside them."""

    def __init__(self, server: Server, cases: list[SyntheticCase]) -> None:
        self.server = server
        self.client = DICOMwebClient(f"{server.url}/dicom-web")
        self.files = [
            write_series(
                server.studies / f"patient-{number}" / "series",
                case.image,
                case.affine_ras,
                SeriesIdentity(f"SYNTH-{number}", "MR", f"T1 of {number}", number),
                ("axial", "sagittal", "coronal")[number],
            )
            for number, case in enumerate(cases)
        ]
        for file in self.files[2]:
            transcode(file, gdcm.TransferSyntax.JPEG2000Lossless)
        self.series = [read_series(files) for files in self.files]

    def add_real(self, source: Path) -> Series:
        """A real series among the studies, its empty UIDs filled."""
        target = self.server.studies / "-".join(source.parts[-2:])
        files = fill_uids(source, self.server.folder / "real")
        shutil.move(files[0].parent, target)
        series = read_series(sorted(target.iterdir()))
        wait_until(lambda: series.uid in self.server.get("/datastore/?output=all").json()["objects"], 20)
        return series

    def names(self, number: int) -> tuple[str, str, str]:
        """Study, Series and SOP Instance UID of a patient's first file."""
        header = dcmread(self.files[number][0])
        return str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studies]:
    cases = list(draw_cases(4, seed=3))
    conf = {"models": "hippocampus_mr", "ohif_for_files": "false"}  # tests/integration/test_presented.py has it on
    server = prepare(Server(tmp_path_factory.mktemp("dicom"), conf), {"flat": cases[3]})
    made = Studies(server, cases[:3])
    server.start()
    wait_until(lambda: server.get("/datastore/").json()["total"] == 4)
    yield made
    assert server.stop() in (0, -15)
    left = [path.name for path in server.temporary.iterdir() if path.name.startswith(("unetr-", "mask-"))]
    assert left == [], "temporary files were left behind"


def test_files_and_series_are_images_side_by_side(studies: Studies) -> None:
    images = set(studies.server.get("/datastore/?output=all").json()["objects"])
    assert {"flat", *(series.uid for series in studies.series)} <= images
    assert studies.server.get("/datastore/").json()["dicom"]["problems"] == {}


def test_studies_are_found_by_patient_and_by_date(studies: Studies) -> None:
    assert len(studies.client.search_for_studies()) == 3
    found = studies.client.search_for_studies(search_filters={"PatientID": "SYNTH-1"})
    assert [study["0020000D"]["Value"][0] for study in found] == [studies.names(1)[0]]
    assert found[0]["00080061"]["Value"] == ["MR"]
    assert found[0]["00201206"]["Value"] == [1]
    assert found[0]["00201208"]["Value"] == [len(studies.files[1])]
    for filters, count in (
        ({"PatientID": "SYNTH-*"}, 3),
        ({"PatientID": "SYNTH-?"}, 3),
        ({"PatientName": "synth-2^synth*"}, 1),
        ({"StudyDate": "19991231-20000101"}, 3),
        ({"StudyDate": "20000102-"}, 0),
        ({"ModalitiesInStudy": "CT"}, 0),
        ({"ModalitiesInStudy": "CT,MR"}, 3),
        ({"StudyInstanceUID": ",".join(studies.names(n)[0] for n in (0, 2))}, 2),
        ({"00100020": "SYNTH-0"}, 1),
    ):
        assert len(studies.client.search_for_studies(search_filters=filters)) == count, filters
    assert len(studies.client.search_for_studies(search_filters={"PatientName": "Synthetic"}, fuzzymatching=True)) == 3


def test_pages_do_not_overlap_and_remaining_is_fetched(studies: Studies) -> None:
    pages = [studies.client.search_for_studies(limit=2, offset=offset) for offset in (0, 2, 4)]
    assert [len(page) for page in pages] == [2, 1, 0]
    uids = {study["0020000D"]["Value"][0] for page in pages for study in page}
    assert len(uids) == 3
    assert len(studies.client.search_for_studies(limit=1, get_remaining=True)) == 3


def test_fields_are_included_as_asked(studies: Studies) -> None:
    series = studies.client.search_for_series(
        search_filters={"PatientID": "SYNTH-0"}, fields=["MagneticFieldStrength", "FlipAngle"]
    )[0]
    assert series["00181314"]["Value"] == [8.0]
    assert "00181314" not in studies.client.search_for_series()[0]


def test_series_and_instances_are_found_below_their_study(studies: Studies) -> None:
    study, series, sop = studies.names(0)
    found = studies.client.search_for_series(study)
    assert [entry["0020000E"]["Value"][0] for entry in found] == [series]
    assert found[0]["00201209"]["Value"] == [len(studies.files[0])]
    assert len(studies.client.search_for_series()) == 3
    instances = studies.client.search_for_instances(study, series)
    assert len(instances) == len(studies.files[0])
    assert instances[0]["00080018"]["Value"] == [sop]
    assert len(studies.client.search_for_instances()) == sum(map(len, studies.files))
    one = studies.client.search_for_instances(study, search_filters={"InstanceNumber": 3})
    assert len(one) == 1
    assert studies.client.search_for_series("1.2.3") == []


def test_metadata_is_that_of_the_files(studies: Studies) -> None:
    study, series, sop = studies.names(1)
    assert len(studies.client.retrieve_study_metadata(study)) == len(studies.files[1])
    assert len(studies.client.retrieve_series_metadata(study, series)) == len(studies.files[1])
    told = studies.client.retrieve_instance_metadata(study, series, sop)
    header = dcmread(studies.files[1][0])
    assert told["00200032"]["Value"] == [float(value) for value in header.ImagePositionPatient]
    assert told["00280010"]["Value"] == [header.Rows]
    assert "7FE00010" not in told


def test_instances_are_the_files(studies: Studies) -> None:
    study, series, sop = studies.names(0)
    assert len(studies.client.retrieve_study(study)) == len(studies.files[0])
    found = {str(i.SOPInstanceUID): i for i in studies.client.iter_series(study, series)}
    for file in studies.files[0]:
        own = dcmread(file)
        np.testing.assert_array_equal(found[str(own.SOPInstanceUID)].pixel_array, own.pixel_array)
    assert studies.client.retrieve_instance(study, series, sop) == dcmread(studies.files[0][0])
    alone = requests.get(
        f"{studies.client.base_url}/studies/{study}/series/{series}/instances/{sop}",
        headers={"Accept": "application/dicom"},
        timeout=60,
    )
    assert alone.content == studies.files[0][0].read_bytes()


def test_compressed_instance_is_sent_as_stored_or_uncompressed_as_asked(studies: Studies) -> None:
    study, series, sop = studies.names(2)
    expected = dcmread(studies.files[2][0])
    for asked, syntax in (("*", JPEG_2000), (JPEG_2000, JPEG_2000), (EXPLICIT, EXPLICIT)):
        sent = studies.client.retrieve_instance(study, series, sop, media_types=(("application/dicom", asked),))
        assert sent.file_meta.TransferSyntaxUID == syntax
        np.testing.assert_array_equal(sent.pixel_array, expected.pixel_array)
    address = f"{studies.client.base_url}/studies/{study}/series/{series}/instances/{sop}"
    said = requests.get(address, headers={"Accept": "application/dicom"}, timeout=60)
    plain = dcmread(io.BytesIO(said.content))
    assert plain.file_meta.TransferSyntaxUID == EXPLICIT, "the standard's default"
    np.testing.assert_array_equal(plain.pixel_array, expected.pixel_array)


@pytest.mark.parametrize("number", [0, 2])
def test_frames_are_the_pixels(studies: Studies, number: int) -> None:
    study, series, sop = studies.names(number)
    own = dcmread(studies.files[number][0])
    (raw,) = studies.client.retrieve_instance_frames(
        study, series, sop, [1], media_types=(("application/octet-stream", EXPLICIT),)
    )
    np.testing.assert_array_equal(np.frombuffer(raw, "<u2").reshape(own.Rows, own.Columns), own.pixel_array)


def test_compressed_frames_pass_through(studies: Studies) -> None:
    study, series, sop = studies.names(2)
    (jpeg,) = studies.client.retrieve_instance_frames(study, series, sop, [1], media_types=(("image/jp2", JPEG_2000),))
    pixels = np.array(Image.open(io.BytesIO(jpeg)))
    np.testing.assert_array_equal(pixels, dcmread(studies.files[2][0]).pixel_array)
    # as OHIF asks
    address = f"{studies.client.base_url}/studies/{study}/series/{series}/instances/{sop}/frames/1"
    accept = {"Accept": "multipart/related; type=application/octet-stream; transfer-syntax=*"}
    said = requests.get(address, headers=accept, timeout=60)
    assert f"application/octet-stream; transfer-syntax={JPEG_2000}".encode() in said.content
    assert jpeg in said.content


def test_frames_of_a_multi_frame_image_are_numbered(studies: Studies) -> None:
    """A SEG made here is one: 1-bit frames, packed each by itself."""
    server, series = studies.server, studies.series[0]
    answer = server.post(f"/infer/hippocampus_mr?image={series.uid}&output=dicom_seg", files={"params": (None, "{}")})
    assert answer.status_code == 200, answer.text
    seg = dcmread(io.BytesIO(answer.content))
    studies.client.store_instances([seg])
    names = str(seg.StudyInstanceUID), str(seg.SeriesInstanceUID), str(seg.SOPInstanceUID)
    frames = studies.client.retrieve_instance_frames(*names, [3, 1])
    planes = seg.pixel_array
    for raw, plane in zip(frames, (planes[2], planes[0]), strict=True):
        bits = np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little")[: plane.size]
        np.testing.assert_array_equal(bits.reshape(plane.shape), plane)
    with pytest.raises(requests.HTTPError, match="400"):
        studies.client.retrieve_instance_frames(*names, [len(planes) + 1])


def test_pictures_have_the_window_that_is_asked_for(studies: Studies) -> None:
    study, series, sop = studies.names(0)
    own = dcmread(studies.files[0][0])
    png = studies.client.retrieve_instance_rendered(
        study, series, sop, media_types=("image/png",), params={"window": "100,200,linear"}
    )
    grey = np.array(Image.open(io.BytesIO(png))).astype(int)
    expected = np.clip((own.pixel_array - 99.5) / 199 + 0.5, 0, 1) * 255
    assert np.abs(grey - expected).max() <= 0.5
    jpeg = studies.client.retrieve_instance_frames_rendered(study, series, sop, [1], media_types=("image/jpeg",))
    assert Image.open(io.BytesIO(jpeg)).size == (own.Columns, own.Rows)
    assert Image.open(io.BytesIO(studies.client.retrieve_series_rendered(study, series))).size == (
        own.Columns,
        own.Rows,
    )
    small = requests.get(
        f"{studies.client.base_url}/studies/{study}/series/{series}/thumbnail?viewport=16,16", timeout=60
    )
    assert max(Image.open(io.BytesIO(small.content)).size) == 16


@pytest.mark.parametrize(
    ("path", "accept", "status"),
    [
        ("studies/1.2.3", "*/*", 404),
        ("studies/1.2.3/metadata", "*/*", 404),
        ("studies?limit=many", "*/*", 400),
        ("studies?Nonsense=1", "*/*", 400),
        ("patients", "*/*", 400),
        ("studies/{0}/series/{1}/instances/{2}/frames/2", "*/*", 400),
        ("studies/{0}/series/{1}/instances/{2}/frames/1", "image/jp2", 406),
        ("studies/{0}/series/{1}/instances/{2}", "text/html", 406),
        ("studies/{0}/series/{1}/instances/{2}/rendered", "video/mp4", 406),
        ("studies/{0}/series/{1}/instances/{2}/rendered?window=1", "*/*", 400),
        ("studies/{0}/series/1.2.3/instances/{2}", "*/*", 404),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(studies: Studies, path: str, accept: str, status: int) -> None:
    said = studies.server.get("/dicom-web/" + path.format(*studies.names(0)), headers={"Accept": accept})
    assert said.status_code == status, said.text
    assert said.json()["detail"]


@pytest.mark.parametrize("number", [0, 1, 2])
def test_prediction_and_its_segmentation_are_one_mask(studies: Studies, number: int) -> None:
    """As NIfTI and as DICOM SEG: the same voxels, of an axial, a sagittal and a compressed coronal series."""
    server, series = studies.server, studies.series[number]
    answer = server.post(f"/infer/hippocampus_mr?image={series.uid}&output=dicom_seg", files={"params": (None, "{}")})
    seg = dcmread(io.BytesIO(answer.content))
    assert seg.SegmentSequence[0].SegmentLabel == "anterior"
    mask = predict(server, series)
    assert mask.any()
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)


@pytest.mark.parametrize("folder", ["hippocampus_mr/study1", "hippocampus_mr/study2"])
def test_prediction_of_a_real_series_and_its_segmentation_are_one_mask(
    studies: Studies, shared_data: Path, folder: str
) -> None:
    source = shared_data / "dicom" / folder
    if not source.is_dir():
        pytest.skip(f"needs dicom/{folder} in the folder of real data")
    series = studies.add_real(source)
    try:
        address = f"/infer/hippocampus_mr?image={series.uid}&output=dicom_seg"
        seg = dcmread(io.BytesIO(studies.server.post(address, files={"params": (None, "{}")}).content))
        mask = predict(studies.server, series)
        assert set(np.unique(mask)) == {0, 1, 2}
        np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)
    finally:
        shutil.rmtree(series.frames[0].file.parent)


def predict(server: Server, series: Series) -> np.ndarray:
    """The mask of a series, by way of NIfTI."""
    answer = server.infer("hippocampus_mr", series.uid, result_extension=".nii.gz")
    assert answer.status_code == 200, answer.text
    name, content = parse_multipart(answer)["image"]
    assert name is not None
    image = nib.Nifti1Image.from_bytes(gzip.decompress(content))
    np.testing.assert_allclose(image.affine, series.affine_ras, atol=1e-4)
    return np.asarray(image.dataobj)


def test_stored_segmentation_is_the_label_of_its_series(studies: Studies) -> None:
    server, series = studies.server, studies.series[1]
    completed = server.get("/datastore/").json()["completed"]
    mask = draw_mask(series.shape)
    for seed in (1, 2):  # the second takes the place of the first; images are counted, not segmentations
        mask = draw_mask(series.shape, seed=seed)
        seg = write_segmentation(mask, series, load_preset("hippocampus_mr"), Origin("SEMIAUTOMATIC", "1", "Anna"))
        told = studies.client.store_instances([seg], study_instance_uid=str(seg.StudyInstanceUID))
        assert str(told.ReferencedSOPSequence[0].ReferencedSOPInstanceUID) == str(seg.SOPInstanceUID)
        assert server.get("/datastore/").json()["completed"] == completed + 1
    found = studies.client.search_for_series(str(seg.StudyInstanceUID), search_filters={"Modality": "SEG"})
    assert [entry["0020000E"]["Value"][0] for entry in found] == [str(seg.SeriesInstanceUID)]
    kept = studies.client.retrieve_series(str(seg.StudyInstanceUID), str(seg.SeriesInstanceUID))[0]
    np.testing.assert_array_equal(read_segmentation(kept, series).labels, mask)
    label = nib.Nifti1Image.from_bytes(
        gzip.decompress(server.get(f"/datastore/label?label={series.uid}&tag=final").content)
    )
    np.testing.assert_array_equal(np.asarray(label.dataobj), mask)


def test_label_of_slicer_becomes_a_segmentation_that_takes_the_place_of_the_one_before(studies: Studies) -> None:
    server, series = studies.server, studies.series[2]
    study = str(series.header.StudyInstanceUID)
    for seed in (1, 2):
        mask = draw_mask(series.shape, seed=seed)
        file = server.folder / "slicer.nii.gz"
        nib.save(nib.Nifti1Image(np.where(mask == 1, 2, mask == 2).astype(np.uint8), series.affine_ras), file)
        answer = server.save_label(series.uid, file.read_bytes(), ["posterior", "anterior"])  # in Slicer's own order
        assert answer.status_code == 200, answer.text
        (found,) = studies.client.search_for_series(study, search_filters={"Modality": "SEG"})
        (seg,) = studies.client.retrieve_series(study, found["0020000E"]["Value"][0])
        read = read_segmentation(seg, series)
        np.testing.assert_array_equal(read.labels, mask)
        assert read.names == {1: "anterior", 2: "posterior"}
    assert seg.SegmentSequence[0].SegmentAlgorithmType in ("MANUAL", "SEMIAUTOMATIC")
    assert seg.SeriesNumber == 302
    assert len(server.get(f"/datastore/label/versions?image={series.uid}&tag=final").json()) == 2


def test_segmentation_beside_an_unchanged_label_names_what_made_its_mask(studies: Studies) -> None:
    server, series = studies.server, studies.series[0]
    answer = parse_multipart(server.infer("hippocampus_mr", series.uid, result_extension=".nii.gz"))
    mask, engine = answer["image"][1], json.loads(answer["params"][1])["engine"]
    changed = np.asarray(nib.Nifti1Image.from_bytes(gzip.decompress(mask)).dataobj).copy()
    changed[0, 0, 0] = 1
    file = server.folder / "changed.nii.gz"
    nib.save(nib.Nifti1Image(changed, series.affine_ras), file)
    for content, kind in ((mask, "AUTOMATIC"), (file.read_bytes(), "SEMIAUTOMATIC")):
        assert server.save_label(series.uid, content, ["anterior", "posterior"]).status_code == 200
        study = str(series.header.StudyInstanceUID)
        (found,) = studies.client.search_for_series(study, search_filters={"Modality": "SEG"})
        (seg,) = studies.client.retrieve_series(study, found["0020000E"]["Value"][0])
        segment = seg.SegmentSequence[0]
        assert segment.SegmentAlgorithmType == kind
        made_by = segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion
        assert made_by == seg.SoftwareVersions == f"shipped ({engine})"


def test_segmentation_that_is_no_label_is_refused_and_the_rest_is_stored(studies: Studies) -> None:
    series = studies.series[0]
    seg = write_segmentation(draw_mask(series.shape), series, load_preset("hippocampus_mr"), Origin())
    overlapping = dcmread(save(seg))
    overlapping.SOPInstanceUID = overlapping.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    for groups in overlapping.PerFrameFunctionalGroupsSequence:
        groups.PlanePositionSequence[0].ImagePositionPatient = list(series.frames[0].position_mm)
    stranger = dcmread(save(seg))
    stranger.ReferencedSeriesSequence[0].SeriesInstanceUID = "1.2.3"
    stranger.SharedFunctionalGroupsSequence[0].pop("DerivationImageSequence", None)
    for groups in stranger.PerFrameFunctionalGroupsSequence:
        del groups.DerivationImageSequence
    for item in stranger.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        item.ReferencedSOPInstanceUID = "1.2.3.4"
    body, content_type = related([save(overlapping).read(), save(stranger).read(), save(seg).read()])
    said = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert said.status_code == 202
    failed = said.json()["00081198"]["Value"]
    sentences = [item["0040A160"]["Value"][0] for item in failed]
    assert "'anterior' and 'posterior' overlap" in sentences[0] or "overlap" in sentences[0]
    assert "is of series 1.2.3, which is none of the images here" in sentences[1]
    assert len(said.json()["00081199"]["Value"]) == 1


def save(instance: object) -> io.BytesIO:
    buffer = io.BytesIO()
    instance.save_as(buffer, write_like_original=False)  # type: ignore[attr-defined]
    buffer.seek(0)
    return buffer


def related(parts: list[bytes]) -> tuple[bytes, str]:
    body = b"".join(b"--limit\r\nContent-Type: application/dicom\r\n\r\n" + part + b"\r\n" for part in parts)
    return body + b"--limit--\r\n", 'multipart/related; type="application/dicom"; boundary=limit'


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{}", "application/json", 400),
        (b"no parts", 'multipart/related; type="application/dicom"; boundary=x', 400),
        (related([b"no DICOM"])[0], related([])[1], 400),
        (related([b"no DICOM"])[0][:-12], related([])[1], 400),
    ],
)
def test_what_is_no_store_request_is_refused(studies: Studies, body: bytes, content_type: str, status: int) -> None:
    said = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert said.status_code == status, said.text


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the memory is Linux's to tell")
@pytest.mark.parametrize("content_type", [related([])[1], "multipart/related"], ids=["no DICOM", "no boundary"])
def test_300_mb_of_garbage_to_store_leave_the_memory_as_it_is(studies: Studies, content_type: str) -> None:
    process = studies.server.process
    assert process is not None
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the peak begins anew
    before = peak_mib(process.pid)
    block = bytes(range(1, 251)) * 4000
    opening, closing = related([b""])[0][:-13], b"\r\n--limit--\r\n"
    body = itertools.chain([opening], itertools.repeat(block, 300), [closing])
    said = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert said.status_code == 400, said.text
    assert peak_mib(process.pid) - before < 50


def peak_mib(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def test_stored_images_are_images_at_once_and_new_files_within_seconds(studies: Studies, tmp_path: Path) -> None:
    case = list(draw_cases(6, seed=9))
    files = write_series(tmp_path / "a", case[4].image, case[4].affine_ras, SeriesIdentity("SYNTH-8", "MR", "sent"))
    body, content_type = related([file.read_bytes() for file in files])
    said = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert said.status_code == 200, said.text
    uid = str(dcmread(files[0]).SeriesInstanceUID)
    assert uid in studies.server.get("/datastore/?output=all").json()["objects"]
    total = studies.server.get("/datastore/").json()["total"]
    again = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert again.status_code == 200, "the same once more changes nothing"
    edit(files[0], PixelData=dcmread(files[1]).PixelData)
    body, content_type = related([files[0].read_bytes()])
    said = studies.server.post("/dicom-web/studies", data=body, headers={"Content-Type": content_type})
    assert said.status_code == 409
    assert "another one has it already" in said.json()["00081198"]["Value"][0]["0040A160"]["Value"][0]
    write_series(tmp_path / "b", case[5].image, case[5].affine_ras, SeriesIdentity("SYNTH-9", "MR", "copied"))
    shutil.copytree(tmp_path / "b", studies.server.studies / "copied")
    wait_until(lambda: studies.server.get("/datastore/").json()["total"] == total + 1, 10)
    shutil.rmtree(studies.server.studies / "copied")
    wait_until(lambda: studies.server.get("/datastore/").json()["total"] == total, 10)


def test_broken_file_is_told_and_the_rest_of_its_study_goes_on(studies: Studies) -> None:
    folder = studies.server.studies / "broken"
    folder.mkdir()
    (folder / "half.dcm").write_bytes(studies.files[0][0].read_bytes()[:400])
    try:
        wait_until(lambda: studies.server.get("/datastore/").json()["dicom"]["problems"], 15)
        assert "broken/half.dcm" in studies.server.get("/datastore/").json()["dicom"]["problems"]
        assert len(studies.client.search_for_studies(search_filters={"PatientID": "SYNTH-0"})) == 1
    finally:
        shutil.rmtree(folder)


def test_eight_clients_read_frames_while_others_segment_and_store(studies: Studies) -> None:
    study, uid, _ = studies.names(0)
    pixels = {str(dcmread(f).SOPInstanceUID): dcmread(f).PixelData for f in studies.files[0]}
    seg = write_segmentation(
        draw_mask(studies.series[0].shape), studies.series[0], load_preset("hippocampus_mr"), Origin()
    )
    done = threading.Event()

    def read(_: int) -> int:
        client, count = DICOMwebClient(f"{studies.server.url}/dicom-web"), 0
        while not done.is_set() or not count:
            for sop, expected in pixels.items():
                assert client.retrieve_instance_frames(study, uid, sop, [1]) == [expected]
                count += 1
        return count

    def work() -> None:
        try:
            for _ in range(2):
                body, content_type = related([save(seg).read()])
                headers = {"Content-Type": content_type}
                assert studies.server.post("/dicom-web/studies", data=body, headers=headers).status_code == 200
                assert studies.server.infer("hippocampus_mr", studies.series[1].uid).status_code == 200
        finally:
            done.set()

    with ThreadPoolExecutor(9) as pool:
        readers = [pool.submit(read, number) for number in range(8)]
        pool.submit(work).result(120)
        assert all(reader.result(120) >= len(pixels) for reader in readers)


def test_next_sample_names_study_and_series(studies: Studies) -> None:
    known = {series.uid: series for series in studies.series}
    for image in studies.server.get("/leases/").json()["leases"]:
        studies.server.delete("/leases/", params={"image": image})
    for uid in known:  # other tests may have labelled all of them
        studies.server.delete("/datastore/label", params={"id": uid, "tag": "final"})
    # each client holds its case, so that sooner or later one is given a series
    for number in range(studies.server.get("/datastore/").json()["total"]):
        chosen = studies.server.post("/activelearning/random", json={"client_id": f"reader {number}"}).json()
        if chosen.get("id") in known:
            break
    assert chosen["SeriesInstanceUID"] == chosen["id"]
    assert chosen["StudyInstanceUID"]
    assert chosen["PatientID"].startswith("SYNTH-")


def test_next_sample_for_ohif_is_a_series_and_one_with_a_gap_is_left_out_with_the_reason(studies: Studies) -> None:
    server, case = studies.server, next(iter(draw_cases(1, seed=12)))
    uids = []
    for name in ("gap", "whole"):
        files = write_series(
            server.studies / name, case.image, case.affine_ras, SeriesIdentity(f"SYNTH-{name}", "MR", name)
        )
        uids.append(str(dcmread(files[0]).SeriesInstanceUID))
    broken, whole = uids
    (server.studies / "gap" / "0006.dcm").unlink()
    wait_until(lambda: {broken, whole} <= set(server.get("/datastore/?output=all").json()["objects"]), 20)
    asked = {"Referer": f"{server.url}/ohif/monai-label?StudyInstanceUIDs=1.2"}
    chosen = set()
    for number in range(8):
        answer = server.post("/activelearning/first", json={"client_id": f"viewer {number}"}, headers=asked)
        assert answer.status_code == 200, answer.text
        chosen.add(answer.json().get("id"))
    assert whole in chosen
    assert not {"flat", broken} & chosen
    left_out = server.get("/datastore/problems").json()["left_out"]["hippocampus_mr"]
    assert "mm apart" in left_out[broken]
    for name in ("gap", "whole"):
        shutil.rmtree(server.studies / name)


def test_organ_that_was_not_drawn_in_ohif_or_slicer_is_missing_in_the_training(studies: Studies) -> None:
    """Whoever corrects one organ does not teach that there is no other, though Slicer names its empty segment too."""
    server, (first, second) = studies.server, studies.series[:2]
    only_anterior = [np.where(draw_mask(series.shape) == 1, 1, 0).astype(np.uint8) for series in (first, second)]
    seg = write_segmentation(only_anterior[0], first, load_preset("hippocampus_mr"), Origin("MANUAL", "", "Anna"))
    studies.client.store_instances([seg], study_instance_uid=str(seg.StudyInstanceUID))
    file = server.folder / "partial.nii.gz"
    nib.save(nib.Nifti1Image(only_anterior[1], second.affine_ras), file)
    assert server.save_label(second.uid, file.read_bytes(), ["anterior", "posterior"]).status_code == 200
    recipe = {"max_epochs": 1, "max_steps": 1, "val_split": 0, "dataset": "Dataset"}
    made = server.post("/train/hippocampus_mr?run_sync=true", json=recipe).json()["version"]
    said = server.get(f"/model/versions/hippocampus_mr/{made}").json()
    assert {first.uid, second.uid} <= set(said["split"]["train"]), said["left_out"]
    assert said["missing_labels"][first.uid] == said["missing_labels"][second.uid] == ["posterior"]


def _segment(studies: Studies, address: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    """Exit code and summary of ``run.py segment`` with the server's weights."""
    places = ["--model", "hippocampus_mr", "--model-dir", str(studies.server.models), "--out", str(out)]
    code = segment(["--studies", address, *places, "--devices", "cpu", "--engine", "pytorch", "--threads", "1", *more])
    return code, json.loads((out / "summary.json").read_text())


def test_worker_segments_the_servers_pool_and_sends_its_masks_back_once(studies: Studies, tmp_path: Path) -> None:
    server, uid = studies.server, studies.series[0].uid
    code, told = _segment(studies, server.url, tmp_path, "--save-labels", "by-worker")
    assert (code, told["failed"]) == (0, {})
    assert {"flat", *(series.uid for series in studies.series)} <= {case["case"] for case in told["cases"]}
    for case in ("flat", uid):
        info = server.get("/datastore/label/info", params={"label": case, "tag": "by-worker"}).json()
        assert (info["source"], info["model_version"], info["preset"]) == ("inference", "shipped", "hippocampus_mr")
        kept = server.get("/datastore/label", params={"label": case, "tag": "by-worker"}).content
        (tmp_path / "kept.nii.gz").write_bytes(kept)
        mask = np.asarray(nib.load(tmp_path / "kept.nii.gz").dataobj)
        assert mask.any() and np.array_equal(mask, np.asarray(nib.load(tmp_path / f"{case}.nii.gz").dataobj))
    code, told = _segment(studies, server.url, tmp_path, "--save-labels", "by-worker")
    assert (code, told["finished_now"]) == (0, 0)
    versions = server.get("/datastore/label/versions", params={"image": "flat", "tag": "by-worker"}).json()
    assert len(versions) == 1


def test_worker_neither_computes_nor_replaces_what_a_person_drew(studies: Studies, tmp_path: Path) -> None:
    server = studies.server
    drawn = np.zeros(nib.load(server.studies / "flat.nii.gz").shape, np.uint8)
    drawn[:2] = 1
    label = encode(drawn, nib.load(server.studies / "flat.nii.gz").affine, tmp_path)
    assert server.save_label("flat", label, ["Anterior"], "by-hand").status_code == 200
    code, told = _segment(studies, server.url, tmp_path / "out", "--save-labels", "by-hand", "--shard", "1/1")
    assert code == 0 and "flat" not in {case["case"] for case in told["cases"]} and told["cases"]
    params = {"model": "hippocampus_mr", "source": "inference"}
    files = {"params": (None, json.dumps(params)), "label": ("mask.nii.gz", label, "application/gzip")}
    refused = server.put("/datastore/label", params={"image": "flat", "tag": "by-hand"}, files=files)
    assert refused.status_code == 409 and "a model's mask does not replace it" in refused.json()["detail"]


def test_worker_takes_the_series_of_a_query(studies: Studies, tmp_path: Path) -> None:
    root, uid = f"{studies.server.url}/dicom-web", studies.series[1].uid
    code, told = _segment(studies, f"{root}/series?SeriesInstanceUID={uid}", tmp_path)
    assert (code, [case["case"] for case in told["cases"]]) == (0, [uid])
    volume = read_volume(studies.files[1][0].parent)
    assert np.array_equal(nib.load(tmp_path / f"{uid}.nii.gz").affine.round(3), volume.affine_ras.round(3))
    code, told = _segment(studies, f"{root}?SeriesInstanceUID={uid}", tmp_path)
    assert (told["finished_now"], told["finished_before"]) == (0, 1)
    code, told = _segment(studies, f"{root}?Modality=CT", tmp_path)
    assert (code, told["cases"]) == (0, [])
