"""Retraining in the background against the real server: decided, watched, killed, gone on with, reported."""

from __future__ import annotations

import html
import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
import requests
import yaml
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.configs.catalogue import load_preset
from tests.integration.conftest import encode, prepare
from tests.integration.server import Server, wait_until

CASES = 9
SECONDS = 400
NAMES = ["anterior", "posterior"]


def small_preset() -> dict[str, Any]:
    """The hippocampus task with a network that trains in seconds."""
    data = load_preset("hippocampus_mr").model_dump(mode="json")
    data["name"] = "small"
    data["roi_size"] = [24, 32, 24]
    data["network"] |= {"feature_size": 4, "hidden_size": 48, "mlp_dim": 64, "num_heads": 4}
    data["training"] |= {"batch_size": 2, "val_interval": 1000, "learning_rate": 4e-3, "precision": "fp32"}
    return data


@pytest.fixture(scope="module")
def bodies() -> dict[str, SyntheticCase]:
    return {f"s{number:02d}-a": case for number, case in enumerate(draw_cases(CASES, seed=21))}


@pytest.fixture(scope="module")
def retraining(tmp_path_factory: pytest.TempPathFactory, bodies: dict[str, SyntheticCase]) -> Iterator[Server]:
    """A server whose policy trains after six labels."""
    folder = tmp_path_factory.mktemp("retraining")
    preset = folder / "small.yaml"
    preset.write_text(yaml.safe_dump(small_preset()))
    conf = {
        "preset": str(preset),
        "retrain": "auto",
        "retrain_after": "6",
        "retrain_quiet_seconds": "0.5",
        "retrain_floor": "0",
        "retrain_recipe": "max_epochs=24,crops_per_case=1",
        "subject_separator": "-",
        "gate_margin": "0.0",
    }
    server = Server(folder / "server", conf)
    for name, case in bodies.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"{name}.nii.gz")
    server.start()
    yield server
    server.stop()


def submit(
    server: Server, name: str, label: np.ndarray, affine: np.ndarray, folder: Path, model: str = "small"
) -> None:
    info = [{"name": label_name, "idx": index} for index, label_name in enumerate(NAMES, start=1)]
    params = {"label_info": info, "model": model, "client_id": "tester"}
    files = {"params": (None, json.dumps(params)), "label": ("x.nii.gz", encode(label, affine, folder))}
    answer = server.put("/datastore/label", params={"image": name, "tag": "final"}, files=files)
    assert answer.status_code == 200, answer.text


def runs(server: Server, model: str = "small") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.get(f"/runs/{model}").json()
    return found


def training_process(server: Server) -> psutil.Process:
    return next(p for p in server.children() if "lib.server.work.job_process" in " ".join(p.cmdline()))


def step_of(run: dict[str, Any]) -> int:
    return int((run["progress"] or {}).get("step", 0))


def test_labels_are_trained_on_by_themselves_through_kills_of_trainer_and_server(
    retraining: Server, bodies: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    server, names = retraining, list(bodies)
    assert server.get("/retrain/").json()["small"]["reason"] == "no label is new yet"
    for count, name in enumerate(names[:6], start=1):
        if count == 6:
            state = server.get("/retrain/").json()["small"]
            assert (state["train"], state["new_labels"]) == (False, 5)
            assert state["reason"] == "5 labels are new or changed; waits for 6"
        submit(server, name, bodies[name].label, bodies[name].affine_ras, tmp_path)
    wait_until(lambda: runs(server) and step_of(runs(server)[0]) >= 2, SECONDS)
    assert "a training runs" in server.get("/retrain/").json()["small"]["reason"]
    (run,) = runs(server)
    assert (run["status"], run["why"]) == ("RUNNING", "6 labels are new or changed, and 6 are enough")
    assert run["progress"]["memory"]["resident_mib"] > 100

    training_process(server).send_signal(signal.SIGKILL)
    submit(server, names[6], bodies[names[6]].label, bodies[names[6]].affine_ras, tmp_path)  # it is for the next run
    wait_until(lambda: "goes on from its state" in str(server.get("/train/").json()["details"]), SECONDS)
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.start()
    assert [r["run"] for r in runs(server)] == [run["run"]]
    events = list(read_events(server, f"/runs/small/{run['run']}/events"))
    kinds, last = {kind for kind, _ in events}, events[-1][1]
    assert kinds >= {"end"}
    assert (last["status"], last["version"], last["decision"]) == ("DONE", "v0001", "published"), last
    assert {"epoch", "step", "loss", "dice", "eta_seconds", "memory"} <= last["progress"].keys()

    said = server.infer("small", names[8], output="json")
    assert said.status_code == 200
    details = server.get("/model/versions/small/v0001").json()
    assert sorted(row["image"] for row in details["trained_on"]) == details["split"]["train"]
    assert set(details["label_digests"]) == set(names[:6]), "the seventh came in while it ran"
    assert details["run"] == run["run"]
    page = server.get(f"/runs/small/{run['run']}/report")
    assert page.headers["content-type"].startswith("text/html")
    assert "<svg" in page.text and "data:image/png;base64," in page.text and "http-equiv" not in page.text
    assert server.get(f"/runs/small/{run['run']}/report.json").json()["curves"]["loss"]
    assert server.get("/runs/small/..%2f..%2fx").status_code == 404
    state = server.get("/retrain/").json()["small"]
    assert (state["new_labels"], state["last_version"]) == (1, "v0001")


def read_events(server: Server, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As a browser reads server-sent events: it comes again when the stream ends."""
    for _ in range(60):
        kind = ""
        with requests.get(server.url + path, stream=True, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines(decode_unicode=True):
                kind = line.removeprefix("event: ") if line.startswith("event: ") else kind
                if line.startswith("data: "):
                    yield kind, json.loads(line.removeprefix("data: "))
                    if kind == "end":
                        return
    raise TimeoutError("the run has not ended")


def test_labels_below_the_floor_are_looked_into_and_wrong_ones_are_not_served(
    bodies: dict[str, SyntheticCase], tmp_path: Path
) -> None:
    """Too few for the usual number, and each shifted by six voxels: the shipped model's Dice on them starts a run."""
    first = dict(list(bodies.items())[:5])
    conf = {"models": "hippocampus_mr", "retrain": "auto", "retrain_after": "50", "retrain_floor": "0.7",
            "retrain_quiet_seconds": "0.5", "retrain_recipe": "max_epochs=1,max_steps=2,crops_per_case=1",
            "subject_separator": "-"}  # fmt: skip
    server = prepare(Server(tmp_path / "server", conf), first)
    server.start()
    try:
        for name, case in first.items():
            submit(server, name, np.roll(case.label, 6, axis=2), case.affine_ras, tmp_path, "hippocampus_mr")
        wait_until(lambda: [r for r in runs(server, "hippocampus_mr") if r["status"] == "DONE"], SECONDS)
        (run,) = runs(server, "hippocampus_mr")
        assert re.fullmatch(r"the served model has a mean Dice of 0\.[0-4]\d+ on \d new labels, below 0\.7", run["why"])
        listed = server.get("/model/versions/hippocampus_mr").json()
        assert (listed["live"], run["decision"]) == (None, "rejected"), "the shipped weights stay"
        reason = next(row["reason"] for row in listed["versions"] if row["version"] == run["version"])
        page = server.get(f"/model/versions/hippocampus_mr/{run['version']}/report").text
        assert reason.startswith("rejected: ") and html.escape(reason) in page
    finally:
        server.stop()


def test_recipe_that_is_none_keeps_the_server_from_starting(tmp_path: Path) -> None:
    server = Server(tmp_path, {"retrain": "auto", "retrain_recipe": "max_epochs=many"})
    assert server.launch().wait(90) != 0
    assert "--conf retrain_recipe: parameter 'max_epochs' is 'many'" in server.log.read_text()
