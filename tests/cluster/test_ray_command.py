"""``run.py segment --ray`` and a server's ``cluster`` on a Ray cluster that asks for a token, as a user starts them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from synthetic_hippocampus import draw_cases

from launcher.environment import read_stamp, requirements_digest
from launcher.project import Project
from launcher.pythons import python_version
from lib.activelearning.score_store import ScoreStore
from lib.cluster.cli import main
from lib.configs.catalogue import write_preset
from lib.networks.checkpoint import Checkpoint, write_checkpoint
from lib.networks.unetr import build_unetr
from tests.cluster.ray_nodes import REPOSITORY, TwoNodes
from tests.integration.conftest import prepare
from tests.integration.server import Server
from tests.tiny import boxes, tiny_preset, write_nifti

pytest.importorskip("ray", reason="needs Ray: python3 run.py setup --cluster")

PRESET = tiny_preset()
TOKEN = "the-token-of-this-cluster-and-no-other"
CASES = ("Bauch müde", "case1", "case2", "case3", "Ω-scan")
WITH_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
REFUSED = {
    "wrong": (
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN[::-1]},
        "the one in RAY_AUTH_TOKEN is not the cluster's",
    ),
    "none": ({"RAY_AUTH_MODE": "token"}, "there is none in"),
    "not asked for": ({"RAY_AUTH_MODE": "disabled"}, "none is given, since RAY_AUTH_MODE is not 'token'"),
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    """One node of one core."""
    project = Project(REPOSITORY)
    version = python_version([str(project.python)])
    if version is None or read_stamp(project).get("cluster") != requirements_digest(project, "cluster", version):
        pytest.skip("run.py would install Ray first: python3 run.py setup --cluster")
    made = TwoNodes(second=False, token=TOKEN)
    yield made
    made.stop()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """Of a run over five cases with random weights, but for the folder of masks."""
    torch.manual_seed(0)
    (tmp_path / "model" / "tiny").mkdir(parents=True)
    write_checkpoint(
        tmp_path / "model" / "tiny" / "shipped.pt", Checkpoint(build_unetr(PRESET).state_dict(), PRESET, {})
    )
    write_preset(tmp_path / "tiny.yaml", PRESET)
    for seed, name in enumerate(CASES):
        write_nifti(tmp_path / "studies" / f"{name}.nii.gz", boxes(seed=seed)[0])
    arguments = ["--studies", str(tmp_path / "studies"), "--model", str(tmp_path / "tiny.yaml"), "--engine", "pytorch"]
    return [*arguments, "--model-dir", str(tmp_path / "model")]


def _segment(arguments: list[str], environment: Mapping[str, str], home: Path) -> subprocess.CompletedProcess[str]:
    """``run.py segment``, without what this process may know of Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(REPOSITORY / "run.py"), "segment", *arguments]
    environment = {**own, "HOME": str(home), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_command_makes_the_masks_of_one_process_and_leaves_out_what_that_has_done(
    nodes: TwoNodes, arguments: list[str], tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert main([*arguments, "--out", str(here), "--devices", "cpu"]) == 0
    assert main([*arguments, "--out", str(there), "--devices", "cpu", "--shard", "1/2"]) == 0
    share = json.loads((there / "summary-1-of-2.json").read_text())["finished_now"]
    assert 0 < share < len(CASES)
    run = _segment([*arguments, "--ray", nodes.address, "--out", str(there)], WITH_TOKEN, tmp_path)
    assert run.returncode == 0, run.stderr
    assert TOKEN not in run.stdout + run.stderr
    said = json.loads((there / "summary.json").read_text())
    assert (said["finished_before"], said["finished_now"], said["failed"]) == (share, len(CASES) - share, {})
    for name in CASES:
        mask = f"{name}.nii.gz"
        assert (there / mask).read_bytes() == (here / mask).read_bytes(), f"the mask of {name} differs"


@pytest.mark.slow
def test_share_of_the_cases_runs_on_the_cluster_and_a_second_call_computes_nothing(
    nodes: TwoNodes, arguments: list[str], tmp_path: Path
) -> None:
    command = [*arguments, "--ray", nodes.address, "--out", str(tmp_path / "out"), "--shard", "1/2"]
    counts = []
    for _ in range(2):
        run = _segment(command, WITH_TOKEN, tmp_path)
        assert run.returncode == 0, run.stderr
        said = json.loads((tmp_path / "out" / "summary-1-of-2.json").read_text())
        counts.append((said["finished_now"], said["finished_before"]))
    assert counts == [(counts[0][0], 0), (0, counts[0][0])] and 0 < counts[0][0] < len(CASES)


def test_devices_of_this_machine_are_refused_beside_a_cluster(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out"), "--ray", "auto", "--devices", "cpu"]) == 2
    assert "a Ray cluster's workers take the devices of their nodes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("given", list(REFUSED))
def test_command_without_the_token_ends_with_a_sentence(
    nodes: TwoNodes, arguments: list[str], tmp_path: Path, given: str, outside: bool
) -> None:
    environment, reason = REFUSED[given]
    address = nodes.outside_address if outside else nodes.address
    refused = _segment([*arguments, "--ray", address, "--out", str(tmp_path / "out")], environment, tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert "Traceback" not in refused.stderr
    # beside the bar and the lines of Ray's own log, which begin with a time
    lines = [line for line in refused.stderr.splitlines() if line.strip() and "?case" not in line]
    told = [line for line in lines if not re.match(r"\[\d{4}-\d\d-\d\d ", line)]
    assert len(told) == 1 and told[0].startswith("error: "), refused.stderr
    assert reason in told[0] and "RAY_AUTH_TOKEN_PATH" in told[0] and address in told[0]


@pytest.mark.slow
def test_token_from_a_file_lets_in(nodes: TwoNodes, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    run = _segment([*arguments, "--ray", nodes.outside_address, "--out", str(tmp_path / "out")], environment, tmp_path)
    assert run.returncode == 0, run.stderr
    assert sorted(mask.name for mask in (tmp_path / "out").glob("*.nii.gz")) == sorted(
        f"{name}.nii.gz" for name in CASES
    )


@pytest.mark.slow
def test_server_scores_on_the_cluster_with_its_token_and_says_why_it_cannot_without(
    nodes: TwoNodes, tmp_path: Path
) -> None:
    cases = {f"case_{number}": case for number, case in enumerate(draw_cases(3, seed=5))}
    conf = {"models": "hippocampus_mr", "cluster": nodes.address}
    server = prepare(Server(tmp_path, conf, environment=WITH_TOKEN), cases).start()
    before = nodes.processes_made()
    said = server.post("/scoring/all?run_sync=true", json={"model": "hippocampus_mr", "minutes": 3})
    assert said.status_code == 200, said.text
    assert nodes.processes_made() > before, "nothing was computed on the cluster"
    store = ScoreStore(server.models / "hippocampus_mr")
    version = store.latest()
    assert version is not None and version.startswith("shipped")
    records = store.score_records(version)
    store.close()
    assert {image: (record.scored, record.problem) for image, record in records.items()} == dict.fromkeys(
        cases, (True, "")
    )
    assert server.stop() in (0, -15)
    wrong = Server(tmp_path, conf, environment=REFUSED["wrong"][0]).start()
    assert wrong.post("/batch/infer/hippocampus_mr", json={"images": "all"}).status_code == 200
    ended = wrong.wait_for("/batch/infer", 240)
    assert ended["status"] == "ERROR" and "is not the cluster's" in "\n".join(ended["details"])
    assert wrong.stop() in (0, -15)
