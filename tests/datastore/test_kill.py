"""Real kills in a stream of saves: no acknowledged label is ever missing, or anything but what was sent."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.datastore.history import LabelHistory
from lib.storage.files import sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]
KILLS = 200
SECONDS_AT_MOST = 0.25

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")


class Acknowledged:
    """What was promised: SHA-256 by version id, and the order in which each image's came."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.newest: dict[str, str] = {}

    def read(self, output: str) -> None:
        for line in output.splitlines(keepends=True):
            if line.startswith("saved ") and line.endswith("\n"):
                _, version_id, image, digest = line.split()
                assert version_id not in self.digests, "a version was given twice"
                self.digests[version_id] = digest
                self.newest[image] = max(version_id, self.newest.get(image, ""))


def run_and_kill(folder: Path, savers: int, seconds: float) -> list[str]:
    """Let processes save at the same time, and kill them all at once; returns what they printed."""
    command = [sys.executable, str(Path(__file__).with_name("saver.py")), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = [
        subprocess.Popen([*command, f"saver-{n}"], env=environment, stdout=subprocess.PIPE, text=True)
        for n in range(savers)
    ]
    try:
        ready = [wait_until_ready(process) for process in started]
        time.sleep(seconds)
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
        outputs = [process.communicate()[0] for process in started]
    assert all(ready), "one did not start"
    assert all(process.returncode == -signal.SIGKILL for process in started), "one ended by itself"
    return outputs


def wait_until_ready(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return any(line == "ready\n" for line in iter(process.stdout.readline, ""))


def check(folder: Path, promised: Acknowledged) -> None:
    history = LabelHistory(folder / "history", folder / "labels")
    try:
        found = {version.version_id: version for version in history.since(0)}
        missing = promised.digests.keys() - found.keys()
        assert not missing, f"{len(missing)} acknowledged labels are missing: {sorted(missing)[:3]}"
        for version in found.values():
            assert sha256_of(version.file) == version.sha256
            assert promised.digests.get(version.version_id, version.sha256) == version.sha256
        for image, version_id in promised.newest.items():
            latest = history.latest(image)
            assert latest is not None and latest.version_id >= version_id
            assert sha256_of(folder / "labels" / "final" / f"{image}.nii.gz") == latest.sha256
        sequences = [version.sequence for version in found.values()]
        assert len(sequences) == len(set(sequences))
    finally:
        history.close()


def test_200_kills_in_a_stream_of_saves_lose_nothing(tmp_path: Path) -> None:
    random_source, promised, killed = random.Random(7), Acknowledged(), 0
    while killed < KILLS:
        savers = random_source.choice((4, 5, 6))
        for output in run_and_kill(tmp_path, savers, random_source.uniform(0, SECONDS_AT_MOST)):
            promised.read(output)
        killed += savers
        if killed % 50 < savers:
            check(tmp_path, promised)
    check(tmp_path, promised)
    assert len(promised.digests) > KILLS, "the kills hit too few saves to mean anything"
