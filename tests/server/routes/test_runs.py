"""The routes on runs, with a trainer handed in that has nothing but its folder of runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.server.dependencies import get_train_tasks
from lib.server.routes.runs import runs_router
from lib.server.tasks import train_tasks
from lib.trainers.reporting.runs import JOB_FILE
from tests.server.in_process import InProcess


@pytest.fixture
def api(tmp_path: Path) -> InProcess:
    run = tmp_path / "20260101-120000"
    run.mkdir()
    (run / JOB_FILE).write_text(json.dumps({"status": "DONE", "request": {"why": "by hand"}}))
    return InProcess(runs_router, {get_train_tasks: train_tasks({"tiny": SimpleNamespace(runs=tmp_path)})})


def test_run_is_described_and_its_stream_ends_with_it(api: InProcess) -> None:
    state = api.request("GET", "/runs/tiny/20260101-120000").json()
    assert (state["status"], state["why"]) == ("DONE", "by hand")
    stream = api.request("GET", "/runs/tiny/20260101-120000/events")
    assert stream.headers["content-type"].startswith("text/event-stream")
    events = [line for line in stream.text.splitlines() if line.startswith("event:")]
    assert events == ["event: end"]


def test_unknown_model_and_run_are_404_with_the_known_ones(api: InProcess) -> None:
    assert "tiny" in api.request("GET", "/runs/other").json()["detail"]
    answer = api.request("GET", "/runs/tiny/other")
    assert answer.status_code == 404 and "20260101-120000" in answer.json()["detail"]
    assert api.request("GET", "/runs/tiny/20260101-120000/report").status_code == 404
