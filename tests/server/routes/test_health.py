"""Whether the server can work, with models, trainers and studies handed in: no server is started."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest
import torch

from lib.configs.settings import Settings
from lib.datastore.store import VersionedDatastore
from lib.errors import CheckpointError, DeviceError, ModelNotReadyError
from lib.infers.devices.lane import Lane
from lib.infers.devices.lanes import Lanes
from lib.server.dependencies import (
    get_lanes,
    get_settings,
    get_store,
    get_studies,
    get_train_tasks,
    get_weights_loading,
)
from lib.server.http.auth import Authenticator
from lib.server.http.tokens import WatchedTokens, add_token
from lib.server.loading import WeightsLoading
from lib.server.routes.health import router
from lib.server.tasks import train_tasks
from tests.server.in_process import InProcess


class Model:
    """A model whose weights load, or do not."""

    def __init__(self, outcome: str | Exception) -> None:
        self._outcome = outcome

    def load(self) -> dict[str, Any]:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return {"version": self._outcome}


class Slow(Model):
    """A model whose weights are being loaded until they are let go."""

    def __init__(self, outcome: str | Exception) -> None:
        super().__init__(outcome)
        self.let_go, self.loads = threading.Event(), 0

    def load(self) -> dict[str, Any]:
        self.loads += 1
        if not self.let_go.wait(30):
            raise TimeoutError("whoever asks waits for the weights")
        return super().load()


class Trainer:
    """A trainer whose live version is damaged, so that the one before it is served."""

    def serving(self) -> tuple[str, str]:
        return "v0001", "v0002 is damaged"


def api(
    studies: Path,
    models: dict[str, Model],
    lanes: Lanes | None = None,
    patience: float = 30,
    tokens: WatchedTokens | None = None,
    **settings: Any,
) -> InProcess:
    services = {
        get_weights_loading: WeightsLoading(models, patience),
        get_train_tasks: train_tasks({"tiny": Trainer()}),
        get_store: VersionedDatastore(str(studies)),
        get_studies: str(studies),
        get_lanes: lanes or Lanes.of("cpu"),
        get_settings: Settings(**settings),
    }
    return InProcess(router, services, Authenticator(tokens, openid=False))


def test_model_without_weights_is_ready_and_a_damaged_live_version_a_warning(tmp_path: Path) -> None:
    answer = api(tmp_path, {"a": Model("v0001"), "b": Model(ModelNotReadyError("no weights"))}).request(
        "GET", "/readyz"
    )
    assert answer.status_code == 200
    assert answer.json()["models"] == {"a": "v0001", "b": "untrained"}
    assert answer.json()["warnings"] == ["model 'tiny': v0002 is damaged"]


@pytest.mark.parametrize("outcome", ["v0002", CheckpointError("no network of this preset")])
def test_weights_that_are_being_loaded_are_told_and_not_waited_for(tmp_path: Path, outcome: str | Exception) -> None:
    slow = Slow(outcome)
    asking = api(tmp_path, {"a": slow, "b": Model(ModelNotReadyError("no weights"))}, patience=0.05)
    for _ in range(3):
        answer = asking.request("GET", "/readyz")
        assert answer.status_code == 503
        assert answer.json()["models"]["a"] == "loading"
        assert "model 'a': its weights are being loaded" in answer.json()["problems"]
    assert slow.loads == 1, "they are loaded once, however many ask"
    slow.let_go.set()
    later = asking.request("GET", "/readyz")
    while "loading" in later.json()["models"].values():
        later = asking.request("GET", "/readyz")
    assert later.json()["models"] == {"a": outcome if isinstance(outcome, str) else "unusable", "b": "untrained"}
    assert later.status_code == (200 if isinstance(outcome, str) else 503)


def test_names_of_files_are_told_to_those_alone_who_may_see_the_studies(tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    studies.mkdir()
    os.mkfifo(studies / "Mueller.nii.gz")
    token = add_token(tmp_path / "tokens.yaml", "anna", "annotator")
    server = api(studies, {"a": Model("v0001")}, tokens=WatchedTokens(tmp_path / "tokens.yaml"))
    stranger = server.request("GET", "/readyz")
    wrong = server.request("GET", "/readyz", headers={"Authorization": "Bearer wrong"})
    anna = server.request("GET", "/readyz", headers={"Authorization": f"Bearer {token}"})
    assert {answer.status_code for answer in (stranger, wrong, anna)} == {200}
    assert "Mueller.nii.gz" in anna.text and "Mueller" not in stranger.text + wrong.text
    assert "1 files of the studies are left out" in stranger.text


@pytest.mark.parametrize(
    ("outcome", "settings", "problem"),
    [
        (CheckpointError("no network of this preset"), {}, "model 'a': no network of this preset"),
        ("v0001", {"free_disk_mib": 2**40}, "MiB of disk are free; valid: at least"),
    ],
)
def test_weights_or_a_disk_that_cannot_be_used_are_503(
    tmp_path: Path, outcome: str | Exception, settings: dict[str, int], problem: str
) -> None:
    answer = api(tmp_path, {"a": Model(outcome)}, **settings).request("GET", "/readyz")
    assert answer.status_code == 503
    (said,) = answer.json()["problems"]
    assert problem in said


@pytest.mark.parametrize(
    ("broken", "status", "where"), [(("cpu",), 200, "warnings"), (("cpu", "cpu#2"), 503, "problems")]
)
def test_device_that_is_out_is_a_warning_and_all_of_them_are_503(
    tmp_path: Path, broken: tuple[str, ...], status: int, where: str
) -> None:
    lanes = Lanes([Lane(name, torch.device("cpu")) for name in ("cpu", "cpu#2")], retry_seconds=60)

    def compute(lane: Lane) -> None:
        if lane.name in broken:
            raise RuntimeError("CUDA error: unspecified launch failure")

    with contextlib.suppress(DeviceError):
        lanes.run(lanes.work(None), compute)
    answer = api(tmp_path, {"a": Model("v0001")}, lanes).request("GET", "/readyz")
    assert answer.status_code == status
    said = [sentence for sentence in answer.json()[where] if sentence.startswith("device")]
    assert [sentence.split(" failed (")[0] for sentence in said] == [f"device {name}" for name in broken]
    assert all("CUDA error: unspecified launch failure" in sentence for sentence in said)


def test_server_says_that_it_runs_while_every_thread_is_busy() -> None:
    """A thread for it was waited for behind the work of others, and whoever watched took the server for dead."""

    async def ask() -> int:
        threads = anyio.to_thread.current_default_thread_limiter()
        threads.total_tokens = 1
        transport = httpx.ASGITransport(InProcess(router, {}).app)
        async with threads, httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            with anyio.fail_after(30):
                return (await client.get("/healthz")).status_code

    assert anyio.run(ask) == 200
