"""The routes on leases, with leases and studies handed in: no server is started."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from lib.datastore.leases import Leases
from lib.datastore.store import VersionedDatastore
from lib.server.dependencies import get_check_image, get_leases
from lib.server.http.auth import Authenticator
from lib.server.http.names import check_image_known
from lib.server.http.tokens import WatchedTokens, add_token
from lib.server.routes.leases import router
from tests.server.in_process import InProcess


@pytest.fixture
def leases() -> Leases:
    return Leases(now=lambda: 1000.0)


@pytest.fixture
def api(leases: Leases, tmp_path: Path) -> InProcess:
    studies = tmp_path / "studies"
    studies.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), studies / "case_0.nii.gz")
    store = VersionedDatastore(str(studies))
    return InProcess(router, {get_leases: leases, get_check_image: lambda image: check_image_known(store, image)})


def test_leases_are_listed_by_image(api: InProcess, leases: Leases) -> None:
    leases.take("case_0", "anna")
    listed = api.request("GET", "/leases/").json()
    assert list(listed["leases"]) == ["case_0"] and listed["leases"]["case_0"]["client"] == "anna"
    assert listed["skipped"] == {}


def test_skip_needs_a_reason_and_ends_the_lease(api: InProcess, leases: Leases) -> None:
    leases.take("case_0", "anna")
    assert api.request("PUT", "/leases/skipped?image=case_0", json={"reason": " "}).status_code == 400
    assert list(leases.active()) == ["case_0"]
    answer = api.request("PUT", "/leases/skipped?image=case_0", json={"reason": "motion artefacts"})
    assert answer.status_code == 200 and answer.json()["reason"] == "motion artefacts"
    assert leases.active() == {} and list(leases.skipped()) == ["case_0"]
    assert api.request("DELETE", "/leases/skipped?image=case_0").status_code == 200
    assert leases.skipped() == {}


def test_image_or_lease_that_there_is_not_is_404(api: InProcess) -> None:
    assert api.request("PUT", "/leases/skipped?image=case_9", json={"reason": "gone"}).status_code == 404
    assert api.request("DELETE", "/leases/?image=case_0").status_code == 404


def test_lease_of_another_client_is_ended_by_a_reviewer_alone(leases: Leases, tmp_path: Path) -> None:
    path = tmp_path / "tokens.yaml"
    tokens = {user: add_token(path, user, role) for user, role in (("ben", "annotator"), ("rita", "reviewer"))}  # type: ignore[arg-type]
    api = InProcess(router, {get_leases: leases}, Authenticator(WatchedTokens(path), openid=False))
    leases.take("case_0", "anna")
    statuses = [
        api.request("DELETE", "/leases/?image=case_0", headers=headers).status_code
        for headers in ({}, *({"Authorization": f"Bearer {tokens[user]}"} for user in ("ben", "rita")))
    ]
    assert statuses == [401, 403, 200]
    assert leases.active() == {}
