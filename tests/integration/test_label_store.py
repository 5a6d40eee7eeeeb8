"""What clinicians submit to the real server: kept as versions, by name, each case one client's, over kills too."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import requests
from synthetic_hippocampus import SyntheticCase

from lib.datastore.label_files.segment_header import Segment
from lib.datastore.leases import RENEWAL_SHARE
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, parse_multipart
from tests.segment_files import as_slicer_submits, write_segments

LEASE_SECONDS = 6
ORDER = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}]
SWAPPED = [{"name": "Posterior", "idx": 1}, {"name": "HEAD", "idx": 2}]  # head: an alias of anterior


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server of its own, since the others' tests count on labels of theirs."""
    conf = {"lease_minutes": str(LEASE_SECONDS / 60)}
    server = prepare(Server(tmp_path_factory.mktemp("clinic"), conf), cases).start()
    yield server
    assert server.stop() in (0, -15)


def submit(server: Server, image: str, label: bytes, names: list[dict[str, Any]], **params: Any) -> requests.Response:
    sent = {"label_info": names, "client_id": "anna"} | params
    files = {"params": (None, json.dumps(sent)), "label": ("/home/anna/label.nii.gz", label)}
    return server.put("/datastore/label", params={"image": image, "tag": "final"}, files=files)


def fetch(server: Server, image: str) -> np.ndarray:
    content = server.get(f"/datastore/label?label={image}&tag=final").content
    return np.asarray(nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(content))).dataobj)


def swap(voxels: np.ndarray) -> np.ndarray:
    return np.array([0, 2, 1], np.uint8)[voxels]


def test_order_of_segments_changes_nothing_in_what_is_kept(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_0"]
    straight = submit(clinic, "case_0", encode(case.label, case.affine_ras, tmp_path), ORDER).json()
    np.testing.assert_array_equal(fetch(clinic, "case_0"), case.label)
    swapped = submit(clinic, "case_0", encode(swap(case.label), case.affine_ras, tmp_path), SWAPPED).json()
    np.testing.assert_array_equal(fetch(clinic, "case_0"), case.label)
    assert straight["label_map"] == swapped["label_map"] == {"anterior": 1, "posterior": 2}
    assert straight["missing_labels"] == swapped["missing_labels"] == []
    assert swapped["notes"] == ["the values were mapped to those of 'hippocampus_mr' by name"]


def test_other_orientation_is_turned_and_said(clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path) -> None:
    case = cases["case_1"]
    turned = nib.as_closest_canonical(nib.Nifti1Image(case.label, case.affine_ras))
    turned = turned.as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "L")))
    answer = submit(clinic, "case_1", gzip.compress(turned.to_bytes()), ORDER).json()
    np.testing.assert_array_equal(fetch(clinic, "case_1"), case.label)
    assert any("was turned to its image's" in note for note in answer["notes"])


def test_partially_labelled_case_says_what_it_lacks(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_1"]
    label = encode((case.label == 1).astype(np.uint8), case.affine_ras, tmp_path)
    assert submit(clinic, "case_1", label, ORDER).json()["missing_labels"] == ["posterior"]
    said = submit(clinic, "case_1", label, ORDER, complete=True).json()
    assert (said["missing_labels"], said["label_map"]) == ([], {"anterior": 1, "posterior": 2})


def test_correction_knows_the_prediction_that_it_started_from(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    predicted = parse_multipart(clinic.infer("hippocampus_mr", "case_2", client_id="anna", result_extension=".nii.gz"))
    content = predicted["image"][1]
    mask = nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(content)))
    corrected = np.asarray(mask.dataobj).copy()
    corrected[:3, :4, 0] = 1
    changed = int((corrected != np.asarray(mask.dataobj)).sum())
    answer = submit(clinic, "case_2", encode(corrected, mask.affine, tmp_path), ORDER).json()
    assert (answer["voxels_changed"], answer["model_version"]) == (changed, "shipped")
    assert submit(clinic, "case_2", content, ORDER).json()["voxels_changed"] == 0
    stranger = submit(clinic, "case_2", content, ORDER, client_id="bert").json()
    assert (stranger["voxels_changed"], stranger["model_version"]) == (None, "")


def test_versions_are_listed_fetched_and_restored(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_3"]
    good = submit(clinic, "case_3", encode(case.label, case.affine_ras, tmp_path), ORDER).json()["version"]
    bad = submit(clinic, "case_3", encode(swap(case.label), case.affine_ras, tmp_path), ORDER).json()["version"]
    listed = clinic.get("/datastore/label/versions?image=case_3").json()
    assert [entry["version_id"] for entry in listed] == [bad, good]
    assert listed[0]["client_id"] == "anna" and listed[0]["preset"] == "hippocampus_mr" and listed[0]["saved_at"]
    info = clinic.get(f"/datastore/label/versions/{good}/info").json()
    assert info == listed[1] and len(info["sha256"]) == 64
    old = clinic.get(f"/datastore/label/versions/{good}").content
    np.testing.assert_array_equal(
        np.asarray(nib.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(old))).dataobj), case.label
    )
    restored = clinic.post(f"/datastore/label/versions/{good}/restore", json={"client_id": "rita"}).json()
    assert (restored["restored_from"], restored["client_id"]) == (good, "rita")
    np.testing.assert_array_equal(fetch(clinic, "case_3"), case.label)
    assert len(clinic.get("/datastore/label/versions?image=case_3").json()) == 3
    assert clinic.get("/datastore/label/info?label=case_3&tag=final").json()["restored_from"] == good


def open_cases(server: Server) -> list[str]:
    for name in ("case_0", "case_1", "case_2", "case_3", "case_4"):
        server.delete(f"/datastore/label?id={name}&tag=final")
        server.delete(f"/leases/?image={name}")
    return [f"case_{n}" for n in range(5)]


@pytest.mark.parametrize("strategy", ["random", "first"])
def test_two_clients_never_get_the_same_case(clinic: Server, strategy: str) -> None:
    names, given = open_cases(clinic), list[str]()

    def ask(client: str) -> None:
        given.append(requests.post(f"{clinic.url}/activelearning/{strategy}", json={"client_id": client}).json()["id"])

    threads = [threading.Thread(target=ask, args=(f"client {n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == names
    assert clinic.post(f"/activelearning/{strategy}", json={"client_id": "late"}).json() == {}


def test_lease_is_renewed_by_requests_and_ends_with_the_submission_or_the_time(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    open_cases(clinic)
    given = clinic.post("/activelearning/first", json={"client_id": "anna"}).json()
    assert given["id"] == "case_0" and given["lease"]["client"].startswith("anna@")
    assert given["lease"]["until"] - given["lease"]["since"] == pytest.approx(LEASE_SECONDS)
    until = given["lease"]["until"]
    for _ in range(2):
        time.sleep(LEASE_SECONDS * RENEWAL_SHARE + 0.1)
        asked = time.time()
        assert clinic.infer("hippocampus_mr", "case_0", client_id="anna").status_code == 200
        before, until = until, clinic.get("/leases/").json()["leases"]["case_0"]["until"]
        assert until > before and until >= asked + LEASE_SECONDS, "a request renews the lease from its own time on"
    assert clinic.post("/activelearning/first", json={"client_id": "bert"}).json()["id"] == "case_1"
    label = encode(cases["case_0"].label, cases["case_0"].affine_ras, tmp_path)
    assert submit(clinic, "case_0", label, ORDER).status_code == 200
    assert "case_0" not in clinic.get("/leases/").json()["leases"]
    time.sleep(LEASE_SECONDS + 0.5)
    assert clinic.get("/leases/").json()["leases"] == {}
    assert clinic.post("/activelearning/first", json={"client_id": "carl"}).json()["id"] == "case_1"


def test_skipped_case_is_not_handed_out_until_it_is_taken_back(clinic: Server) -> None:
    open_cases(clinic)
    skipped = clinic.put("/leases/skipped?image=case_0", json={"reason": "motion artefacts", "client_id": "anna"})
    assert skipped.status_code == 200
    assert clinic.get("/leases/").json()["skipped"]["case_0"]["reason"] == "motion artefacts"
    given = [clinic.post("/activelearning/first", json={"client_id": f"c{n}"}).json().get("id") for n in range(5)]
    assert given == ["case_1", "case_2", "case_3", "case_4", None]
    assert clinic.delete("/leases/skipped?image=case_0").status_code == 200
    assert clinic.post("/activelearning/first", json={"client_id": "c9"}).json()["id"] == "case_0"


def test_killed_server_has_every_label_that_it_acknowledged(cases: dict[str, SyntheticCase], tmp_path: Path) -> None:
    server, promised = prepare(Server(tmp_path / "server"), cases), {}
    labels = [encode(case.label, case.affine_ras, tmp_path) for case in cases.values()]
    for _ in range(2):
        server.start()
        stop = threading.Event()

        def save_on(first: int, stop: threading.Event = stop) -> None:
            for number in itertools.count(first):
                name = f"case_{number % len(labels)}"
                files = {"params": (None, json.dumps({"label_info": ORDER})), "label": ("l.nii.gz", labels[number % 5])}
                try:
                    answer = requests.put(f"{server.url}/datastore/label?image={name}", files=files, timeout=30)
                except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    return  # killed before the answer, or in the middle of it
                assert answer.status_code == 200
                promised[answer.json()["version"]] = answer.json()["sha256"]

        threads = [threading.Thread(target=save_on, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        stop.wait(1.0)
        server.stop(signal.SIGKILL)
        for thread in threads:
            thread.join()
    server.start()
    try:
        assert len(promised) > 5
        kept = {}
        for name in cases:
            for entry in server.get(f"/datastore/label/versions?image={name}").json():
                kept[entry["version_id"]] = entry["sha256"]
        assert promised.items() <= kept.items()
    finally:
        server.stop()


def test_segmentation_file_is_kept_by_the_names_in_its_header(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_0"]
    segments = (Segment("posterior", 1), Segment("anterior", 2))
    file = write_segments(tmp_path / "sent.seg.nrrd", [swap(case.label)], segments, case.affine_ras)
    for names, status in ([], 200), (as_slicer_submits(segments), 200), (ORDER, 422):
        sent = {"label_info": names, "client_id": "anna"}
        files = {"params": (None, json.dumps(sent)), "label": ("/home/anna/label.seg.nrrd", file.read_bytes())}
        answer = clinic.put("/datastore/label", params={"image": "case_0", "tag": "final"}, files=files)
        assert answer.status_code == status, answer.text
        np.testing.assert_array_equal(fetch(clinic, "case_0"), case.label)
    assert "the header of the file contradicts it" in answer.json()["detail"]


def test_positions_of_slicers_list_are_told_from_values(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_0"]
    after_background = [{"name": "anterior", "idx": 2}, {"name": "posterior", "idx": 3}]
    answer = submit(clinic, "case_0", encode(case.label, case.affine_ras, tmp_path), after_background).json()
    np.testing.assert_array_equal(fetch(clinic, "case_0"), case.label)
    assert any("positions in 3D Slicer's list" in note for note in answer["notes"])
    only_posterior = np.where(case.label == 2, 2, 0).astype(np.uint8)
    unclear = submit(clinic, "case_0", encode(only_posterior, case.affine_ras, tmp_path), after_background)
    assert unclear.status_code == 422 and "drag these segments to the end of the list" in unclear.json()["detail"]


def test_bytes_that_came_are_kept_beside_what_was_made_of_them(
    clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    case = cases["case_0"]
    floats = encode(case.label.astype(np.float64) * 0.99999999, case.affine_ras, tmp_path)
    answer = submit(clinic, "case_0", floats, ORDER)
    assert answer.status_code == 200, answer.text
    kept = nib.load(clinic.studies / "labels" / "final" / "case_0.nii.gz")
    assert kept.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(kept.dataobj), case.label)
    version = answer.json()["version"]
    assert clinic.get(f"/datastore/label/versions/{version}/sent").content == floats
    cut_off = submit(clinic, "case_0", floats[:-6], ORDER)
    assert cut_off.status_code == 422 and "is damaged" in cut_off.json()["detail"]


def test_refused_upload_is_named_as_the_user_named_it(clinic: Server) -> None:
    answer = clinic.put("/datastore/?image=mine", files={"file": ("brain 1.nii.gz", b"no image")})
    assert answer.status_code == 422 and "'brain_1.nii.gz'" in answer.json()["detail"]


def test_each_version_says_what_it_took(clinic: Server, cases: dict[str, SyntheticCase], tmp_path: Path) -> None:
    name = open_cases(clinic)[0]
    assert clinic.post("/activelearning/first", json={"client_id": "anna"}).json()["id"] == name
    label = encode(cases[name].label, cases[name].affine_ras, tmp_path)
    answer = submit(clinic, name, label, ORDER).json()
    assert answer["prompts_used"] == 0 and 0 <= answer["seconds_spent"] < 60
    told = submit(clinic, name, label, ORDER, prompts_used=4).json()
    assert (told["prompts_used"], told["seconds_spent"]) == (4, None), "the case was not handed out again"
    versions = clinic.get(f"/datastore/label/versions?image={name}").json()
    assert [version["prompts_used"] for version in versions[:2]] == [4, 0]
    assert 'id="effort"' in clinic.get("/").text and "Prompts" in clinic.get(f"/case/{name}").text
