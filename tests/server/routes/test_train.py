"""The routes on long work, with jobs and tasks handed in: no server is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter

from lib.errors import ParameterError
from lib.infers.devices.lanes import Lanes
from lib.server.dependencies import (
    get_datastore,
    get_jobs,
    get_journal,
    get_lanes,
    get_pause,
    get_readers,
    get_scoring_methods,
    get_segmentation_tasks,
    get_train_tasks,
)
from lib.server.readers import Readers
from lib.server.routes.train import batch_router, scoring_router, train_router
from lib.server.tasks import segmentation_tasks, train_tasks
from lib.server.work.jobs import Jobs
from lib.server.work.journal import Journal
from lib.server.work.pause import Pause
from tests.server.in_process import InProcess


class Refusing:
    """A task whose requests are never valid."""

    def validate_request(self, request: Mapping[str, Any], strict: bool = False) -> None:
        raise ParameterError("max_epochs", request.get("max_epochs"), "1 to 100000")

    def parse(self, request: Mapping[str, Any]) -> None:
        self.validate_request(request)


@pytest.fixture
def api(tmp_path: Path) -> InProcess:
    router = APIRouter()
    for one in (train_router, batch_router, scoring_router):
        router.include_router(one)
    tasks = {"tiny": Refusing()}
    services = {
        get_jobs: Jobs(),
        get_journal: Journal({"tiny": tmp_path / "runs"}, "studies"),
        get_lanes: Lanes.of("cpu"),
        get_pause: Pause(),
        get_datastore: None,
        get_readers: Readers(1),
        get_scoring_methods: ["uncertainty"],
        get_segmentation_tasks: segmentation_tasks(tasks),
        get_train_tasks: train_tasks(tasks),
    }
    return InProcess(router, services)


@pytest.mark.parametrize(
    ("path", "kind"), [("/train/", "train"), ("/batch/infer", "batch_infer"), ("/scoring/", "scoring")]
)
def test_where_nothing_was_started_the_status_is_404_and_stopping_is_null(api: InProcess, path: str, kind: str) -> None:
    answer = api.request("GET", path)
    assert answer.status_code == 404
    assert answer.json()["detail"] == f"there has been no {kind} task since the server was started"
    running = api.request("GET", f"{path}?check_if_running=true")
    assert running.status_code == 404 and running.json()["detail"] == f"no {kind} task runs or waits"
    stopped = api.request("DELETE", path)
    assert stopped.status_code == 200 and stopped.json() is None


@pytest.mark.parametrize("path", ["/train/tiny", "/train/", "/batch/infer/tiny"])
def test_request_that_is_not_valid_is_refused_before_a_process_starts(api: InProcess, path: str) -> None:
    answer = api.request("POST", path, json={"max_epochs": -1})
    assert answer.status_code == 400 and "max_epochs" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("path", "known"), [("/train/x", "tiny"), ("/batch/infer/x", "tiny"), ("/scoring/x", "uncertainty")]
)
def test_unknown_model_or_method_is_404_with_the_known_ones(api: InProcess, path: str, known: str) -> None:
    answer = api.request("POST", path, json={})
    assert answer.status_code == 404 and known in answer.json()["detail"]
