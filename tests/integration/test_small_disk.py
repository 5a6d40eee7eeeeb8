"""A real server on a disk that is really full, and on one that takes nothing: refused in words, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, fingerprint, wait_until
from tests.small_disk import SmallDisk, mounted

MODEL = "hippocampus_mr"
NAMES = ["anterior", "posterior"]
CLICK = {"plane": "axial", "index": 12, "across": 0.5, "down": 0.5, "label": "anterior"}
SIZE_MIB = 120
REASONS = ("disk is full", "no space left", "cannot be written to", "read-only file system")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "disk", SIZE_MIB) as made:
        yield made


def on_disk(disk: SmallDisk, cases: dict[str, SyntheticCase], conf: dict[str, str], elsewhere: Path) -> Server:
    """A server whose files are all on a disk, but for its log."""
    server = prepare(Server(disk.folder / "server", conf), cases)
    server.log = elsewhere / "server.log"
    return server


def refused(answer: requests.Response) -> bool:
    """Whether an answer says in a sentence that a disk did not take something."""
    said = answer.json()["detail"]
    return answer.status_code == 507 and any(
        why in said for why in ("disk is full", "no space", "be written to", "read-only")
    )


def skip(server: Server, image: str) -> requests.Response:
    return server.put("/leases/skipped", params={"image": image}, json={"reason": "blurred"})


def upload(server: Server, path: str, part: str, content: bytes, name: str = "new.nii.gz") -> requests.Response:
    return server.put(path, files={part: (name, content)})


def test_full_disk_refuses_in_words_and_loses_nothing(
    disk: SmallDisk, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    labels = [encode(cases[name].label, cases[name].affine_ras, tmp_path) for name in ("case_0", "case_1")]
    conf = {"models": MODEL, "result_cache_mib": "0", "free_disk_mib": "8"}
    server = on_disk(disk, cases, conf, tmp_path)
    image, weights = server.studies / "case_1.nii.gz", server.models / MODEL / "shipped.pt"
    server.start()
    try:
        assert server.save_label("case_0", labels[0], NAMES).status_code == 200
        kept = fingerprint(*(server.studies / f"{name}.nii.gz" for name in cases), server.studies / "labels", weights)
        disk.fill()
        answers = {
            "skip": skip(server, "case_2"),
            "label": server.save_label("case_1", labels[1], NAMES),
            "removal of a label": server.delete("/datastore/label?id=case_0&tag=final"),
            "model": upload(server, f"/model/{MODEL}", "file", weights.read_bytes(), "w.pt"),
            "session": upload(server, "/session/", "files", image.read_bytes()),
            "image": upload(server, "/datastore/?image=new", "file", image.read_bytes()),
            "inference": server.infer(MODEL, "case_2"),
            "next sample": server.post("/activelearning/random", json={"client_id": "anna"}),
        }
        served = {path: server.get(path).status_code for path in ("/", "/info/", "/case/case_2", "/datastore/")}
        ready = server.ready()
        assert {what: refused(answer) for what, answer in answers.items()} == dict.fromkeys(answers, True)
        assert served == dict.fromkeys(served, 200)
        assert ready.status_code == 503 and "the disk is full" in ready.text
        assert fingerprint(*map(Path, kept)) == kept
        disk.make_room()
        assert skip(server, "case_2").status_code == 200
        assert server.save_label("case_1", labels[1], NAMES).status_code == 200
        assert server.infer(MODEL, "case_2").status_code == 200
        assert server.ready().status_code == 200
        assert len(server.get("/datastore/?output=train").json()) == 2
    finally:
        server.stop()
    assert "Traceback" not in server.log.read_text()


@pytest.mark.slow
def test_training_ends_in_words_on_a_full_disk_and_goes_on_when_there_is_room(
    disk: SmallDisk, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    server = on_disk(disk, cases, {"models": MODEL}, tmp_path)
    server.start()
    try:
        for name, case in cases.items():
            label = encode(case.label, case.affine_ras, tmp_path)
            assert server.save_label(name, label, NAMES).status_code == 200
        server.post(f"/train/{MODEL}", json={"max_epochs": 3}).raise_for_status()
        wait_until(lambda: any("step" in line for line in server.get("/train/").json().get("details", [])))
        disk.fill()
        ended = server.wait_for("/train/")
        assert ended["status"] == "ERROR" and "the disk is full" in ended["reason"], "\n".join(ended["details"])
        assert ended["waits_for_room"]
        disk.make_room()
        wait_until(lambda: server.get("/train/").json()["status"] == "DONE", 240)
        assert server.get("/train/").json()["id"] == ended["id"]
        versions = server.get(f"/model/versions/{MODEL}").json()["versions"]
        assert [version["version"] for version in versions] == ["shipped", "v0001"], "one run, one version"
    finally:
        server.stop()


def test_studies_that_take_nothing_are_served_as_far_as_they_can_be(
    disk: SmallDisk, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    label = encode(cases["case_1"].label, cases["case_1"].affine_ras, tmp_path)
    server = Server(tmp_path / "server", {"models": MODEL})
    server.studies.rmdir()
    server.studies.symlink_to(disk.folder, target_is_directory=True)
    prepare(server, cases)
    before = fingerprint(disk.folder)
    disk.set_read_only(True)
    server.start()
    try:
        served = {
            path: server.get(path).status_code for path in ("/", "/info/", "/case/case_0", "/datastore/?output=all")
        }
        assert served == dict.fromkeys(served, 200)
        assert server.infer(MODEL, "case_1").status_code == 200
        assert server.post("/activelearning/typical", json={"client_id": "anna"}).json()["id"] in cases
        assert server.post("/case/case_0/clicks", json={"clicks": [CLICK]}).status_code == 200
        answers = {
            "label": server.save_label("case_1", label, NAMES),
            "image": upload(server, "/datastore/?image=new", "file", (disk.folder / "case_1.nii.gz").read_bytes()),
            "removal": server.delete("/datastore/?id=case_0"),
        }
        assert {what: refused(answer) for what, answer in answers.items()} == dict.fromkeys(answers, True)
        ready = server.ready()
        assert ready.status_code == 503 and "labels and images that are sent are refused" in ready.text
        assert "labels and images that are sent are refused" in server.get("/").text
    finally:
        server.stop()
    assert fingerprint(disk.folder) == before
    assert "Traceback" not in server.log.read_text()
