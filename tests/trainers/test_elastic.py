"""``torchrun`` on the command line: two processes, on one node or on two, train one network; one that is killed is
started again."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from lib.cases.labelled import Case
from lib.cases.split import Split, write_split
from lib.networks.checkpoint import read_checkpoint
from lib.server.work.jobs import end_tree
from tests.forks import REPOSITORY, ForkedProcess, server_environment, start_module
from tests.tiny import QUIET_AUGMENTATION, preset_data

Process = ForkedProcess | subprocess.Popen[bytes]
MakeCases = Callable[..., tuple[Case, ...]]
SECONDS = 240


def _start(folder: Path, epochs: int, nodes: int) -> list[Process]:
    """Two processes that train; a launcher for each node, which writes ``node<n>.log``."""
    preset = folder / "tiny.yaml"
    recipe = {"max_epochs": epochs, "learning_rate": 2e-3, "precision": "fp32", "val_interval": 1000}
    preset.write_text(yaml.safe_dump(preset_data(training=recipe | {"augmentation": QUIET_AUGMENTATION})))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["--nnodes", str(nodes)]
    torchrun += ["--nproc-per-node", str(2 // nodes), "--max-restarts", "2", "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-id", "tiny", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
    data = ["--images", str(folder / "images"), "--labels", str(folder / "labels"), "--device", "cpu"]
    data += ["--split", str(folder / "split.json"), "--preset", str(preset), "--state-seconds", "0"]
    out = ["--out", str(folder / "out.pt"), "--run-dir", str(folder / "run")]
    options = [*torchrun, "-m", "lib.trainers.cli", "train", *data, *out]
    return [
        start_module("torch.distributed.run", options, REPOSITORY, server_environment(), folder / f"node{node}.log")
        for node in range(nodes)
    ]


def _said(folder: Path) -> str:
    return "".join(log.read_text(errors="replace") for log in sorted(folder.glob("node*.log")))


def _worker_with_state(launchers: list[Process], folder: Path) -> psutil.Process:
    """The second process, once there is a state to go on from."""
    deadline = time.monotonic() + SECONDS
    while not (folder / "run" / "state.pt").is_file():
        assert time.monotonic() < deadline, _said(folder)[-3000:]
        assert all(launcher.poll() is None for launcher in launchers), _said(folder)[-3000:]
        time.sleep(0.05)
    children = [child for launcher in launchers for child in psutil.Process(launcher.pid).children()]
    workers = [child for child in children if "lib.trainers.cli" in " ".join(child.cmdline())]
    assert len(workers) == 2
    return workers[1]


@pytest.mark.parametrize("nodes", [1, 2])
def test_worker_that_is_killed_is_restarted_and_the_run_goes_on(
    nodes: int, make_cases: MakeCases, tmp_path: Path
) -> None:
    cases = [case.case_id for case in make_cases(5)]
    write_split(tmp_path / "split.json", Split(tuple(cases[:4]), tuple(cases[4:])), "by hand")
    launchers = _start(tmp_path, epochs=10, nodes=nodes)
    try:
        _worker_with_state(launchers, tmp_path).send_signal(signal.SIGKILL)
        assert [launcher.wait(SECONDS) for launcher in launchers] == [0] * nodes, _said(tmp_path)[-4000:]
    finally:
        for launcher in launchers:
            end_tree(launcher)
    said = _said(tmp_path)
    assert "resumed after step" in said
    progress = json.loads((tmp_path / "run" / "progress.json").read_text(encoding="utf-8"))
    assert (progress["step"], progress["epoch"]) == (20, 10), "10 epochs of two steps, each of two cases"
    side_car = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert side_car["training"]["steps"] == 20
    assert side_car["held_out"]["cases"] == 1
    assert said.count('"mean_dice"') == 1, "one of the two writes and scores"
    assert read_checkpoint(tmp_path / "out.pt").preset is not None
