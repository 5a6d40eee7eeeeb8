"""The routes on versions of labels, with a history handed in: no server is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.datastore.history import LabelHistory
from lib.server.dependencies import get_history
from lib.server.routes.labels import router
from tests.server.in_process import InProcess


@pytest.fixture
def api(tmp_path: Path) -> InProcess:
    return InProcess(router, {get_history: LabelHistory(tmp_path / "history", tmp_path / "labels")})


@pytest.mark.parametrize("path", ["v1", "v1/sent", "v1/info"])
def test_version_that_there_is_not_is_404_and_named(api: InProcess, path: str) -> None:
    answer = api.request("GET", f"/datastore/label/versions/{path}")
    assert answer.status_code == 404 and "v1" in answer.json()["detail"]


def test_empty_quarantine_is_an_empty_list(api: InProcess) -> None:
    assert api.request("GET", "/datastore/quarantine").json() == []
