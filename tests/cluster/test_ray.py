"""Ray as the engine, on two nodes with one core each: nothing is lost, and nothing comes out differently."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic_hippocampus import draw_cases

from lib.cluster.engine import Recipe
from lib.cluster.ray_engine import RayEngine
from lib.errors import CheckpointError, ConfigError
from tests.cluster.ray_nodes import TwoNodes
from tests.cluster.sleeper import Sleeper
from tests.integration.conftest import prepare
from tests.integration.server import Server, wait_until
from tests.tiny import tiny_preset

pytest.importorskip("ray", reason="needs Ray: python3 run.py setup --cluster")
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own

PRESET = tiny_preset()


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    made = TwoNodes()
    yield made
    made.stop()


def _recipe() -> Recipe[Any, str]:
    return Recipe("v0001", lambda device: Sleeper())


def test_case_that_kills_its_worker_three_times_is_reported_and_the_others_are_done(nodes: TwoNodes) -> None:
    items = [0.01, 0.02, "deadly", 0.03, "unreadable", 0.04, 0.05]
    finished = {one.item: one for one in RayEngine(nodes.address).run(items, _recipe)}
    assert sorted(map(str, finished)) == sorted(map(str, items))
    assert "it ended its worker 3 times" in finished.pop("deadly").problem
    assert finished.pop("unreadable").problem == "it cannot be read"
    assert {one.answer for one in finished.values()} == {"v0001"}


def test_node_that_is_killed_loses_nothing_and_another_joins(nodes: TwoNodes) -> None:
    answers = []
    for one in RayEngine(nodes.address).run([0.3 + number / 1000 for number in range(16)], _recipe):
        answers.append(one)
        if len(answers) == 3:
            nodes.kill_second()
    assert sorted(one.item for one in answers) == [0.3 + number / 1000 for number in range(16)]
    assert {(one.answer, one.problem) for one in answers} == {("v0001", "")}
    nodes.start_second()


@pytest.mark.slow
def test_cluster_is_reached_from_outside_of_it(nodes: TwoNodes) -> None:
    items = [0.01, "unreadable", 0.02, "deadly", 0.03]
    finished = {one.item: one for one in RayEngine(nodes.outside_address).run(items, _recipe)}
    assert sorted(map(str, finished)) == sorted(map(str, items))
    assert "it ended its worker 3 times" in finished["deadly"].problem and finished[0.03].answer == "v0001"


@pytest.mark.slow
def test_newer_version_is_used_from_its_next_case_on_and_named(nodes: TwoNodes) -> None:
    asked: list[int] = []

    def recipe() -> Recipe[Any, str]:
        asked.append(0)
        version = "v0001" if len(asked) <= 6 else "v0002"
        return Recipe(version, lambda device: Sleeper(version))

    versions = [one.answer for one in RayEngine(nodes.address).run([0.01] * 12, recipe)]
    assert sorted(versions) == ["v0001"] * 6 + ["v0002"] * 6


@pytest.mark.slow
def test_worker_that_cannot_be_made_ends_the_run_with_its_sentence(nodes: TwoNodes) -> None:
    def make(device: str) -> Sleeper:
        raise CheckpointError("damaged weights")

    with pytest.raises(CheckpointError, match="damaged weights"):
        list(RayEngine(nodes.address).run([0.01], lambda: Recipe("v0001", make)))


@pytest.mark.parametrize("address", ["127.0.0.2:1", "ray://127.0.0.2:1"])
def test_cluster_that_is_not_there_is_a_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=f"no Ray cluster to be reached at '{address}': Connection refused"):
        list(RayEngine(address).run([0.01], _recipe))


@pytest.mark.parametrize(
    "address", ["http://127.0.0.2:1", "127.0.0.2", "ray://127.0.0.2", "a:b", "cluster of ours", "x:99999"]
)
def test_address_that_is_none_is_a_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=r"is no address of a Ray cluster; valid: auto, HOST:PORT"):
        list(RayEngine(address).run([0.01], _recipe))


@pytest.mark.slow
def test_batch_of_a_server_runs_on_the_cluster_and_is_found_again_by_the_next(nodes: TwoNodes, tmp_path: Path) -> None:
    cases = {f"case_{number:02d}": case for number, case in enumerate(draw_cases(16, seed=11))}
    conf = {"models": "hippocampus_mr", "cluster": nodes.address}
    server = prepare(Server(tmp_path, conf, environment={"RAY_USAGE_STATS_ENABLED": "0"}), cases).start()

    def labelled() -> list[str]:
        objects = server.get("/datastore/?output=all").json()["objects"]
        return sorted(case for case in cases if "original" in objects[case]["labels"])

    assert server.post("/batch/infer/hippocampus_mr", json={"images": "all"}).status_code == 200
    wait_until(lambda: len(list((server.studies / "labels" / "original").glob("*.nii.gz"))) > 1, 120)
    server.stop(signal.SIGKILL)
    before = sorted(file.name for file in (server.studies / "labels" / "original").glob("*.nii.gz"))
    assert 1 < len(before) < len(cases)
    server.start()
    ended = server.wait_for("/batch/infer", 240)
    assert ended["status"] == "DONE", "\n".join(ended["details"])
    assert labelled() == sorted(cases)
    for case in cases:
        versions = server.get("/datastore/label/versions", params={"image": case, "tag": "original"}).json()
        assert [(v["source"], v["model_version"]) for v in versions] == [("inference", "shipped")], "made once"
    assert not list((server.models / "hippocampus_mr" / "batches").glob("*.json"))
    assert server.stop() in (0, -15)
