"""The routes on versions of labels, with a history handed in: no server is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lib.datastore.history import LabelHistory
from lib.datastore.records import Submission
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


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
def test_link_out_of_the_history_is_never_sent(tmp_path: Path) -> None:
    history = LabelHistory(tmp_path / "history", tmp_path / "labels")
    secret, came = tmp_path / "secret.nii.gz", tmp_path / "came.nii.gz"
    secret.write_bytes(b"a secret")
    came.write_bytes(b"a label")
    version = history.append(came, Submission(image_id="case_1"))
    refused = history.quarantine.keep(came, "wrong", {"image_id": "case_1"})
    api = InProcess(router, {get_history: history})
    paths = [f"label/versions/{version.version_id}", f"label/versions/{version.version_id}/sent"]
    paths.append(f"quarantine/{refused.name}")
    assert [api.request("GET", f"/datastore/{path}").content for path in paths] == [b"a label"] * 3
    for file in (version.file, refused.file):
        file.unlink()
        file.symlink_to(secret)
    for path in paths:
        answer = api.request("GET", f"/datastore/{path}")
        assert answer.status_code == 404 and b"secret" not in answer.content
