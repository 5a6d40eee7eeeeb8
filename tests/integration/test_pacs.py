"""A PACS behind the server: Orthanc, with a password; and what a client may not reach through the server."""

from __future__ import annotations

import http.client
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import requests
from dicom_series import SeriesIdentity, write_series
from dicomweb_client import DICOMwebClient
from pydicom import dcmread
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.cluster.cli import main as segment
from lib.configs.catalogue import load_preset
from lib.dicom.remote import CONNECT_SECONDS, QUERY_SECONDS
from lib.dicom.segmentation_reader import read_segmentation
from lib.dicom.segmentation_writer import Origin, write_segmentation
from lib.dicom.series import read_series
from tests.dicom.conftest import draw_mask
from tests.integration.conftest import prepare
from tests.integration.pacs import PASSWORD, USER, Orthanc
from tests.integration.server import Server, wait_until
from tests.integration.test_dicomweb import predict

pytestmark = pytest.mark.orthanc


class Clinic:
    """Orthanc with two patients, and a server in front of it."""

    def __init__(self, folder: Path, cases: list[SyntheticCase]) -> None:
        self.orthanc = Orthanc(folder / "orthanc")
        self.files = [
            write_series(
                folder / f"s{n}", case.image, case.affine_ras, SeriesIdentity(f"SYNTH-{n}", "MR", f"T1 {n}", n)
            )
            for n, case in enumerate(cases[:2])
        ]
        self.late = write_series(
            folder / "late",
            cases[2].image,
            cases[2].affine_ras,
            SeriesIdentity("SYNTH-late", "MR", "T1", 9),
            "sagittal",
        )
        for files in self.files:
            self.orthanc.add(files)
        self.series = [read_series(files) for files in self.files]
        password = {"MONAI_LABEL_DICOMWEB_USERNAME": USER, "MONAI_LABEL_DICOMWEB_PASSWORD": PASSWORD}
        conf = {"models": "hippocampus_mr"}
        self.server = prepare(Server(folder / "server", conf, dicomweb=self.orthanc.dicomweb, environment=password), {})
        self.client = DICOMwebClient(f"{self.server.url}/dicom-web")


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    made = Clinic(tmp_path_factory.mktemp("clinic"), list(draw_cases(3, seed=4)))
    try:
        made.server.start()
        yield made
        assert made.server.stop() in (0, -15)
    finally:
        made.orthanc.stop()


def test_series_of_the_presets_modality_are_images_and_new_ones_show_up_within_seconds(clinic: Clinic) -> None:
    images = clinic.server.get("/datastore/?output=all").json()["objects"]
    assert set(images) == {series.uid for series in clinic.series}
    clinic.orthanc.add(clinic.late)
    wait_until(lambda: clinic.server.get("/datastore/").json()["total"] == 3, 10)
    assert len(clinic.client.search_for_studies(search_filters={"PatientID": "SYNTH-late"})) == 1


def test_query_is_passed_on(clinic: Clinic) -> None:
    study = str(clinic.series[0].header.StudyInstanceUID)
    for root in ("/dicom-web", "/proxy/dicom/qido"):
        found = clinic.server.get(f"{root}/studies?StudyInstanceUID={study}&includefield=00081030").json()
        assert [entry["00100020"]["Value"][0] for entry in found] == ["SYNTH-0"]
    assert len(clinic.client.search_for_studies(limit=1)) == 1


def test_metadata_frames_and_instances_are_those_of_the_pacs(clinic: Clinic) -> None:
    own = dcmread(clinic.files[1][3])
    names = str(own.StudyInstanceUID), str(own.SeriesInstanceUID), str(own.SOPInstanceUID)
    assert len(clinic.client.retrieve_series_metadata(*names[:2])) == len(clinic.files[1])
    raw_pixels = (("application/octet-stream", "1.2.840.10008.1.2.1"),)
    (frame,) = clinic.client.retrieve_instance_frames(*names, [1], media_types=raw_pixels)
    assert frame == own.PixelData
    np.testing.assert_array_equal(clinic.client.retrieve_instance(*names).pixel_array, own.pixel_array)
    metadata = f"/proxy/dicom/qido/studies/{names[0]}/metadata"  # where OHIF asks for it
    assert len(clinic.server.get(metadata).json()) == len(clinic.files[1])


def test_prediction_and_its_segmentation_are_one_mask(clinic: Clinic) -> None:
    series = clinic.series[0]
    address = f"/infer/hippocampus_mr?image={series.uid}&output=dicom_seg"
    seg = dcmread(io.BytesIO(clinic.server.post(address, files={"params": (None, "{}")}).content))
    mask = predict(clinic.server, series)
    assert mask.any()
    np.testing.assert_array_equal(read_segmentation(seg, series).labels, mask)


def test_stored_segmentation_is_the_label_and_reaches_the_pacs(clinic: Clinic) -> None:
    series, before = clinic.series[1], clinic.orthanc.count("SEG")
    mask = draw_mask(series.shape)
    for number in (1, 2):
        seg = write_segmentation(mask, series, load_preset("hippocampus_mr"), Origin("MANUAL", creator="Anna"), number)
        clinic.client.store_instances([seg])
        assert clinic.server.get("/datastore/").json()["completed"] == 1
    assert clinic.orthanc.count("SEG") == before + 2
    kept = clinic.client.retrieve_series(str(seg.StudyInstanceUID), str(seg.SeriesInstanceUID))[0]
    np.testing.assert_array_equal(read_segmentation(kept, series).labels, mask)


def raw(clinic: Clinic, method: str, path: str) -> tuple[int, bytes]:
    """Ask without any tidying up of the path by a client."""
    connection = http.client.HTTPConnection("127.0.0.1", clinic.server.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_host=False)
        connection.putheader("Content-Length", "0")
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


ESCAPES = (
    *(
        "../system",
        "..%2fsystem",
        "..%2Fsystem",
        "%2e%2e/system",
        "%2e%2e%2fsystem",
        "..%252fsystem",
        "%252e%252e%252fsystem",
    ),
    *("studies/../../system", "studies/..%2f..%2fsystem", "studies/%2e%2e/%2e%2e/system", "studies/..%5c..%5csystem"),
    *(
        "studies/1.2/..%2f..%2f..%2finstances",
        "studies%2f..%2f..%2fsystem",
        "studies/1;/../../system",
        "studies/..;/system",
    ),
    *("http://127.0.0.1/system", "http:%2f%2f127.0.0.1%2fsystem", "//127.0.0.1/system", "@127.0.0.1/system"),
    *(
        "system",
        "instances/x/file",
        "studies/1.2%00/../../system",
        "studies/1.2%0d%0aX-A:1",
        "studies/1.2%23/../system",
    ),
    *("modalities", "tools/execute-script", "tools/find", "changes", "studies/1.2/archive", "studies/1.2/modify"),
)


@pytest.mark.parametrize("root", ["/dicom-web/", "/proxy/dicom/wado/", "/proxy/dicom/qido/", "/proxy/dicom/stow/"])
@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_but_dicomweb_is_reached(clinic: Clinic, root: str, escape: str) -> None:
    status, body = raw(clinic, "GET", root + escape)
    assert status in (400, 404), body
    assert b"DatabaseVersion" not in body
    assert b'"error"' in body, "refused by this server, not by the one behind it"


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "POST", "TRACE", "CONNECT", "PROPFIND"])
@pytest.mark.parametrize("path", ["studies/1.2", "studies/1.2/series/3", "instances", "studies/1.2/metadata"])
def test_nothing_but_get_and_store_is_passed_on(clinic: Clinic, method: str, path: str) -> None:
    before = clinic.orthanc.count("MR")
    status, body = raw(clinic, method, f"/dicom-web/{path}")
    # a POST to a study is a STOW, of which this one has no part
    assert status in (400, 405), body
    assert clinic.orthanc.count("MR") == before


def test_pacs_is_reached_from_this_machine_only(clinic: Clinic) -> None:
    listening = {c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr}
    own = [c for c in psutil.net_connections("tcp") if c.laddr and c.laddr.port == clinic.orthanc.port]
    assert listening and {c.laddr.ip for c in own if c.status == "LISTEN"} == {"127.0.0.1"}


def test_inference_right_after_a_deletion_is_not_found(clinic: Clinic) -> None:
    uid = read_series(clinic.late).uid
    wait_until(lambda: uid in clinic.server.get("/datastore/?output=all").json()["objects"], 10)
    assert clinic.server.infer("hippocampus_mr", uid).status_code == 200
    clinic.orthanc.delete(uid)
    answer = clinic.server.infer("hippocampus_mr", uid)
    assert (answer.status_code, answer.json()["error"]) == (404, "NotFoundError")


def test_pacs_that_hangs_holds_nobody_up(clinic: Clinic) -> None:
    """The first who ask wait for one time-out; then everybody is told at once, until it answers again."""
    clinic.server.get("/datastore/")
    clinic.orthanc.hang()
    try:
        wait_until(lambda: clinic.server.get("/readyz").status_code == 503, 30)
        began = time.monotonic()
        answers = {path: clinic.server.get(path) for path in ("/", "/metrics", "/info/", "/readyz", "/datastore/")}
        refused = [
            clinic.server.infer("hippocampus_mr", clinic.series[0].uid),
            clinic.server.post("/activelearning/random", json={}),
            clinic.server.get("/dicom-web/studies"),
        ]
        assert time.monotonic() - began < CONNECT_SECONDS + QUERY_SECONDS
        assert [answer.status_code for answer in refused] == [502] * 3
        assert {path: a.status_code for path, a in answers.items()} == dict.fromkeys(answers, 200) | {"/readyz": 503}
        assert "ReadTimeout" in answers["/readyz"].json()["problems"][0]
        assert "unetr_pacs_answers 0.0" in answers["/metrics"].text
        assert "were listed" in answers["/"].text, "the page says how old the list is"
        assert answers["/datastore/"].json()["dicom"]["list_age_seconds"] > 2
        assert clinic.server.get("/leases/").json()["leases"] == {}
    finally:
        clinic.orthanc.go_on()
    wait_until(lambda: clinic.server.get("/readyz").status_code == 200, 30)
    assert clinic.server.infer("hippocampus_mr", clinic.series[0].uid).status_code == 200


def test_worker_segments_a_pacs_query_and_knows_its_series_again(
    clinic: Clinic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = clinic.series[0].uid
    places = ["--model", "hippocampus_mr", "--model-dir", str(clinic.server.models), "--out", str(tmp_path)]
    command = ["--studies", f"{clinic.orthanc.dicomweb}?SeriesInstanceUID={uid}", *places, "--engine", "pytorch"]
    assert segment(command) == 2
    assert "does not answer as expected (401, " in capsys.readouterr().err
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_USERNAME", USER)
    monkeypatch.setenv("MONAI_LABEL_DICOMWEB_PASSWORD", PASSWORD)
    for finished in ((1, 0), (0, 1)):
        assert segment(command) == 0
        told = json.loads((tmp_path / "summary.json").read_text())
        assert (told["finished_now"], told["finished_before"]) == finished
        assert [case["case"] for case in told["cases"]] == [uid]


def test_pacs_that_is_away_is_told(clinic: Clinic) -> None:
    clinic.orthanc.stop()
    wait_until(lambda: clinic.server.get("/dicom-web/studies").status_code == 502, 10)
    for answer in (
        clinic.server.get("/dicom-web/studies"),
        clinic.server.infer("hippocampus_mr", clinic.series[0].uid),
        clinic.server.post("/activelearning/random", json={}),
    ):
        assert answer.status_code == 502
        assert "DICOMweb server" in answer.json()["detail"]


def test_server_starts_before_its_pacs_does(tmp_path: Path) -> None:
    server = Server(tmp_path / "server", {"models": "hippocampus_mr"}, dicomweb="http://127.0.0.1:9/dicom-web")
    prepare(server, {})
    process = server.launch()
    try:
        wait_until(lambda: process.poll() is not None or answers(server), 90)
        assert process.poll() is None, server.log.read_text()[-2000:]
        away = requests.get(f"{server.url}/datastore/", timeout=60)
        assert (away.status_code, away.json()["error"]) == (502, "UpstreamError")
    finally:
        process.kill()
        process.wait()


def answers(server: Server) -> bool:
    try:
        return requests.get(f"{server.url}/healthz", timeout=5).ok
    except requests.ConnectionError:
        return False
