"""Studies of FIFOs, devices and damaged files, files that others rewrite, and a clock that jumps, over REST."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import encode, prepare
from tests.integration.server import REPOSITORY, Server

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links and FIFOs of POSIX")

DAY = 86_400
# Python runs this when it starts: the server's clock is off by what a file says.
SHIFTED_CLOCK = """
import os, time
_true_time = time.time
def shifted_time():
    try:
        with open(os.environ["CLOCK_IS_OFF_BY"]) as file:
            return _true_time() + float(file.read() or 0)
    except (OSError, ValueError):
        return _true_time()
time.time = shifted_time
"""


@pytest.fixture(scope="module")
def off_by(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that says by how many seconds the server's clock is off."""
    folder = tmp_path_factory.mktemp("clock")
    (folder / "sitecustomize.py").write_text(SHIFTED_CLOCK)
    (folder / "seconds").write_text("0")
    return folder / "seconds"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory, cases: dict[str, SyntheticCase], off_by: Path) -> Iterator[Server]:
    """A server whose studies hold what no study should."""
    path = os.pathsep.join([str(off_by.parent), str(REPOSITORY)])
    environment = {"CLOCK_IS_OFF_BY": str(off_by), "PYTHONPATH": path}
    conf = {"models": "hippocampus_mr", "retrain": "auto", "retrain_after": "50", "retrain_floor": "0",
            "retrain_quiet_seconds": "60", "queue_size": "50"}  # fmt: skip
    server = prepare(Server(tmp_path_factory.mktemp("odd"), conf, environment=environment, forked=False), cases)
    whole = (server.studies / "case_0.nii.gz").read_bytes()
    os.mkfifo(server.studies / "fifo.nii.gz")
    (server.studies / "device.nii.gz").symlink_to("/dev/zero")
    (server.studies / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (server.studies / "wrong.nii.gz").write_bytes(whole[:-8] + b"\0" * 8)
    (server.studies / "junk.nrrd").write_bytes(b"NRRD0004\n" + b"\xff" * 200)
    yield server.start()
    server.stop()


def test_batch_over_odd_studies_ends_and_says_what_it_left_out(odd: Server) -> None:
    assert odd.post("/batch/infer/hippocampus_mr", json={"max_workers": 2}).status_code == 200
    ended = odd.wait_for("/batch/infer")
    assert ended["status"] == "DONE", ended
    said = "\n".join(ended["details"])
    for name in ("cut", "wrong", "junk"):
        assert f"'{name}' was left out: " in said, said
    assert {"fifo", "device"}.isdisjoint(odd.get("/datastore/?output=all").json()["objects"])
    listed = {problem["name"]: problem["reason"] for problem in odd.get("/datastore/problems").json()["files"]}
    assert "no regular file" in listed["fifo.nii.gz"] and "no regular file" in listed["device.nii.gz"]


def test_inferences_on_a_fifo_hang_nobody(odd: Server) -> None:
    """By its name, by its path, and as a file that becomes one after the studies were listed."""
    becomes = odd.studies / "case_4.nii.gz"
    kept = becomes.read_bytes()
    becomes.unlink()
    os.mkfifo(becomes)
    try:
        wanted = ["fifo", "case_4", "fifo.nii.gz", str(odd.studies / "fifo.nii.gz"), "../studies/fifo.nii.gz"] * 9
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = [pool.submit(odd.infer, "hippocampus_mr", image) for image in wanted]
            assert odd.get("/healthz").status_code == 200
            statuses = {answer.result().status_code for answer in answers}
        assert statuses <= {400, 403, 404, 422}, statuses
    finally:
        becomes.unlink()
        becomes.write_bytes(kept)
    assert odd.get("/healthz").status_code == 200


def test_file_that_is_rewritten_while_it_is_read_is_never_a_500(odd: Server) -> None:
    target, done = odd.studies / "case_3.nii.gz", threading.Event()
    whole, other = target.read_bytes(), (odd.studies / "case_2.nii.gz").read_bytes()

    def rewrite() -> None:
        number = 0
        while not done.is_set():
            content = (whole, other[:1000], b"", other)[number % 4]
            with target.open("wb") as file:  # in place, as a careless tool does
                file.write(content[: len(content) // 2])
                file.flush()
                file.write(content[len(content) // 2 :])
            number += 1

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        paths = ["/datastore/image?image=case_3", "/case/case_3", "/datastore/image/check?image=case_3"]
        statuses = {odd.infer("hippocampus_mr", "case_3").status_code for _ in range(25)}
        for path in paths * 15:
            try:
                statuses.add(odd.request("POST" if "check" in path else "GET", path).status_code)
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                # a download whose file became shorter cannot be sent whole
                assert path == paths[0], error
    finally:
        done.set()
        writer.join()
        target.write_bytes(whole)
    assert not {status for status in statuses if status >= 500} - {503}, statuses
    assert "Content-Length" not in odd.log.read_text(), "no answer is longer or shorter than it said"
    assert odd.infer("hippocampus_mr", "case_3").status_code == 200


def test_clock_that_jumps_stops_neither_the_policy_nor_inference(
    odd: Server, cases: dict[str, SyntheticCase], off_by: Path, tmp_path: Path
) -> None:
    label = encode(cases["case_0"].label, cases["case_0"].affine_ras, tmp_path)
    assert odd.save_label("case_0", label, ["anterior", "posterior"]).status_code == 200
    session = odd.put("/session/", files={"files": ("scan.nii.gz", (odd.studies / "case_1.nii.gz").read_bytes())})
    for seconds in (-DAY, -3 * DAY, 0, 400 * DAY, -400 * DAY):
        off_by.write_text(str(seconds))
        state = odd.get("/retrain/").json()["hippocampus_mr"]
        assert state["wait_seconds"] is None or 0 <= state["wait_seconds"] <= 60, (seconds, state)
        answer = odd.infer("hippocampus_mr", "case_0", largest_component=seconds > 0)
        assert answer.status_code == 200, (seconds, answer.text[:300])
        assert odd.ready().status_code == 200, seconds
        for path in ("/info/", "/", "/leases/", "/train/?all=true", "/model/versions/hippocampus_mr"):
            assert odd.get(path).status_code < 500, (seconds, path)
        sample = odd.post("/activelearning/random", json={"client_id": "anna"})
        assert sample.status_code == 200, (seconds, sample.text)
    off_by.write_text("0")
    assert session.status_code == 200
    newest = odd.get("/datastore/label/versions?image=case_0")
    assert newest.status_code == 200 and len(newest.json()) >= 1
