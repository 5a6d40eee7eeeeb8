"""A correction sent over REST is trained on, and the better model is served: against the real server."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
from synthetic_hippocampus import SyntheticCase

from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, wait_until

QUICK = {"max_epochs": 4, "val_split": 0, "dataset": "Dataset", "pretrained": False, "learning_rate": 1e-3, "seed": 1}
ENDLESS = QUICK | {"max_epochs": 10_000}


@pytest.fixture
def labelled(server: Server, cases: dict[str, SyntheticCase], tmp_path: Path) -> list[str]:
    """Two labels, and no other of those that earlier tests left in the shared server."""
    names = ["case_0", "case_1"]
    for name in cases.keys() - set(names):
        assert server.delete(f"/datastore/label?id={name}&tag=final").status_code in (200, 404)
    for name in names:
        label = encode(cases[name].label, cases[name].affine_ras, tmp_path)
        assert server.save_label(name, label, ["anterior", "posterior"]).status_code == 200
    return names


def served_version(server: Server) -> str:
    return server.post("/infer/hippocampus_mr?image=case_3&output=json").json()["model"]["version"]


def test_training_on_few_corrections_is_served_when_a_reviewer_says_so(server: Server, labelled: list[str]) -> None:
    before = served_version(server)
    started = server.post("/train/hippocampus_mr", json=QUICK | {"client_id": "tester"})
    assert started.json()["status"] in ("SUBMITTED", "RUNNING")
    words = "2 labels, fewer than five: all are trained on, and nothing judges the result; what is served stays"
    assert started.json()["notice"].startswith(words)
    shown = next(iter(server.get("/info/").json()["train_stats"].items()))
    assert (shown[0], shown[1]["total_epochs"]) == ("hippocampus_mr", 4), "3D Slicer divides by it from the start"
    assert server.get("/train/?check_if_running=true").status_code == 200
    second = server.post("/train/hippocampus_mr", json=QUICK)
    assert (second.status_code, second.json()["error"]) == (409, "TrainingError")
    ended = server.wait_for("/train/")
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    assert any("loss" in line for line in ended["details"])
    assert len(ended["details"]) <= 20
    stats = server.get("/info/").json()["train_stats"]["hippocampus_mr"]
    assert stats["train"]["metrics"]["loss"] < stats["train"]["metrics"]["first_loss"]
    after = stats["version"]
    assert served_version(server) == before, "nothing has judged the new weights"
    assert (stats["status"], stats["decision"][:9]) == ("unproven", "unproven:")
    assert "best_metric" not in stats, "3D Slicer computes with it where it is there"
    assert ": unproven: no held-out case" in server.get("/page/job").text
    page = server.get("/page/models").text
    assert "unproven" in page and "never compared" in page and f"/{after}/serve" in page
    listed = {row["version"]: row for row in server.get("/model/versions/hippocampus_mr").json()["versions"]}
    assert (listed[after]["status"], listed[after]["never_compared"]) == ("unproven", True)
    refused = server.post("/model/versions/hippocampus_mr/shipped/serve")
    assert refused.status_code == 409 and "is shipped, not unproven" in refused.json()["detail"]
    assert server.post(f"/model/versions/hippocampus_mr/{after}/serve").json() == {"live": after}
    assert served_version(server) == after
    report = server.get(f"/model/versions/hippocampus_mr/{after}/report")
    assert report.status_code == 200 and after in report.text and "<svg" in report.text
    assert f'href="/model/versions/hippocampus_mr/{after}/report"' in server.get("/page/models").text
    assert server.get("/model/versions/hippocampus_mr/shipped/report").status_code == 404
    assert server.get("/train/?check_if_running=true").status_code == 404
    assert server.delete("/model/hippocampus_mr").status_code == 200


def test_stop_ends_the_running_training_and_the_waiting_one(server: Server, labelled: list[str]) -> None:
    first = server.post("/train/hippocampus_mr", json=ENDLESS).json()["id"]
    second = server.post("/train/hippocampus_mr?enqueue=true", json=ENDLESS).json()["id"]
    wait_until(lambda: server.get("/train/").json()["status"] == "RUNNING" and server.children())
    processes = server.children()
    assert server.delete("/train/").json()["status"] == "STOPPED"
    by_id = {job["id"]: job["status"] for job in server.get("/train/?all=true").json()}
    assert (by_id[first], by_id[second]) == ("STOPPED", "STOPPED")
    wait_until(lambda: not any(process.is_running() for process in processes))
    assert server.delete("/train/").json() is None


def test_training_without_labels_ends_with_a_sentence(server: Server, cases: dict[str, SyntheticCase]) -> None:
    for name in cases:
        server.delete(f"/datastore/label?id={name}&tag=final")
    assert server.get("/datastore/").json()["completed"] == 0
    server.post("/train/hippocampus_mr", json=QUICK)
    ended = server.wait_for("/train/")
    assert ended["status"] == "ERROR"
    assert ended["details"][-1].startswith("TrainingError: there is no usable labelled case")
    assert ended["reason"] == ended["details"][-1]
    assert "ERROR" in (page := server.get("/page/job").text) and ": TrainingError: there is no usable" in page


@pytest.mark.parametrize(
    ("number", "forked"), [(signal.SIGTERM, True), (signal.SIGKILL, False)], ids=["SIGTERM", "SIGKILL"]
)
def test_no_training_outlives_its_server(
    number: int, forked: bool, cases: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    """Of a server that a user has started, and of a fork, whose trainings have ended when what it started ends."""
    server = prepare(Server(tmp_path / "server", forked=forked), cases).start()
    label = encode(cases["case_0"].label, cases["case_0"].affine_ras, tmp_path)
    assert server.save_label("case_0", label, ["anterior", "posterior"]).status_code == 200
    server.post("/train/hippocampus_mr", json=ENDLESS)
    wait_until(lambda: any("step" in line for line in server.get("/train/").json().get("details", [])))
    processes = server.children()
    assert processes
    server.stop(number)
    wait_until(lambda: not any(alive(process) for process in processes), seconds=15)


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
