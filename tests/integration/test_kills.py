"""Trainer and server are killed at random moments of the loop: the model loads, no label is lost, the loop finishes."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import psutil
import pytest
import requests
import yaml
from synthetic_hippocampus import SyntheticCase, draw_cases

from lib.networks.checkpoint import read_checkpoint
from lib.storage.files import sha256_of
from tests.integration.conftest import encode
from tests.integration.server import Server, wait_until
from tests.integration.test_retraining import NAMES, small_preset

BATCH = 6
BATCHES = 2
SECONDS = 3600.0


class Killer:
    """Kills the trainer or the server ``count`` times, at random moments, and starts the server again.

    Args:
        server: a running server.
        count: how often.
        seed: of the choice of victims and moments.
        longest: most seconds between two kills.
    """

    def __init__(self, server: Server, count: int, seed: int, longest: float) -> None:
        self.killed = {"trainer": 0, "server": 0}
        self._server, self._left, self._longest = server, count, longest
        self._random = random.Random(seed)
        self.thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        while self._left:
            time.sleep(self._random.uniform(0, self._longest))
            trainers = [p for p in self._server.children() if "job_process" in " ".join(_command(p))]
            if trainers and self._random.random() < 0.7:
                trainers[0].kill()
                self.killed["trainer"] += 1
            elif trainers or self._random.random() < 0.1:  # a server that only waits is a dull victim
                assert self._server.process is not None
                self._server.process.kill()
                self._server.process.wait()
                self._server.start()
                self.killed["server"] += 1
            else:
                continue
            self._left -= 1


def _command(process: psutil.Process) -> list[str]:
    try:
        command: list[str] = process.cmdline()
    except psutil.NoSuchProcess:
        return []
    return command


def persistently(call: Callable[[], Any], deadline: float) -> Any:
    """As a patient client: again, while the server is down."""
    while True:
        try:
            return call()
        except (requests.ConnectionError, requests.Timeout):
            assert time.monotonic() < deadline
            time.sleep(0.3)


def submit(server: Server, name: str, case: SyntheticCase, folder: Path) -> None:
    info = [{"name": label, "idx": index} for index, label in enumerate(NAMES, start=1)]
    params = {"label_info": info, "model": "small", "client_id": "tester"}
    files = {"params": (None, json.dumps(params)), "label": ("x.nii.gz", encode(case.label, case.affine_ras, folder))}
    requests.put(f"{server.url}/datastore/label?image={name}&tag=final", files=files, timeout=60).raise_for_status()


def state_of(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{server.url}/retrain/", timeout=60).json()["small"]
    return found


def finish(server: Server, deadline: float) -> None:
    """Wait until no label is new; a run that was killed too often has failed, and is asked for again by hand."""
    while True:
        state = persistently(lambda: state_of(server), deadline)
        if not state["running"]:
            if not state["new_labels"]:
                return
            if state["failures"]:
                persistently(lambda: requests.post(f"{server.url}/retrain/small", timeout=60), deadline)
        assert time.monotonic() < deadline, state
        time.sleep(0.5)


@pytest.mark.parametrize(
    ("kills", "longest"), [(4, 5.0), pytest.param(100, 12.0, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_kills_leave_a_model_that_loads_every_label_and_a_loop_that_finishes(
    kills: int, longest: float, tmp_path: Path
) -> None:
    cases = {f"k{n:02d}-a": case for n, case in enumerate(draw_cases(BATCH * BATCHES, seed=5))}
    preset = tmp_path / "small.yaml"
    preset.write_text(yaml.safe_dump(small_preset()))
    epochs = 100 if kills > 10 else 20
    conf = {"preset": str(preset), "retrain": "auto", "retrain_after": str(BATCH), "retrain_quiet_seconds": "0.2",
            "retrain_floor": "0", "retrain_recipe": f"max_epochs={epochs}", "subject_separator": "-"}  # fmt: skip
    # a hundred times as a user starts it; a few times as a fork, which is there in a second
    server, deadline = Server(tmp_path / "server", conf, forked=kills < 10), time.monotonic() + SECONDS
    for name, case in cases.items():
        nib.save(nib.Nifti1Image(case.image, case.affine_ras), server.studies / f"{name}.nii.gz")
    server.start()
    killer = Killer(server, kills, seed=1, longest=longest)
    try:
        killer.thread.start()
        names = list(cases)
        for start in range(0, len(names), BATCH):
            for name in names[start : start + BATCH]:
                persistently(lambda name=name: submit(server, name, cases[name], tmp_path), deadline)
            finish(server, deadline)
        while killer.thread.is_alive():  # what is left of the kills falls on runs by hand
            persistently(lambda: requests.post(f"{server.url}/retrain/small", timeout=60), deadline)
            time.sleep(0.5)
            finish(server, deadline)
        finish(server, deadline)
        check(server, cases)
    finally:
        killer.thread.join(60)
        server.stop()
    assert sum(killer.killed.values()) == kills
    print(f"killed: {killer.killed}")


def check(server: Server, cases: dict[str, SyntheticCase]) -> None:
    wait_until(lambda: server.get("/readyz").status_code == 200, 60)
    listed = server.get("/model/versions/small").json()
    assert listed["live"]
    for version in listed["versions"]:
        weights = server.models / "small" / version["version"] / "weights.pt"
        assert sha256_of(weights) == version["sha256"], "every version is whole"
        assert read_checkpoint(weights).info["version"] == version["version"]
    answer = server.infer("small", next(iter(cases)), output="json")
    assert answer.status_code == 200
    store = server.get("/datastore/?output=train").json()
    assert len(store) == len(cases), "every label is there"
    last = server.get(f"/model/versions/small/{listed['versions'][-1]['version']}").json()
    assert set(last["label_digests"]) == set(cases), "and every label has been used"
