"""Real kills in a stream of saves: no acknowledged label or skip is ever missing, or anything but what was sent."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.datastore.history import LabelHistory
from lib.datastore.leases import Leases
from lib.storage.files import sha256_of

REPOSITORY = Path(__file__).resolve().parents[2]
# Each seed is a store of its own. The first of them run always, all of them when slow tests do: 500 kills.
SEEDS = tuple(range(1, 11))
KILLS = 50
ALWAYS = 2
KILLS_BETWEEN_CHECKS = 25
SECONDS_AT_MOST = 0.25
SECONDS_TO_START = 60.0

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")


class Acknowledged:
    """What was promised: SHA-256 by version id, the newest of each image, and the cases that were skipped."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}
        self.newest: dict[str, str] = {}
        self.skipped: set[str] = set()

    def read(self, told: Path) -> None:
        for line in told.read_text().splitlines(keepends=True):
            words = line.split()
            if not line.endswith("\n") or words == ["ready"]:
                continue
            if words[0] == "skipped":
                self.skipped.add(words[1])
                continue
            _, version_id, image, digest = words
            assert version_id not in self.digests, "a version was given twice"
            self.digests[version_id] = digest
            self.newest[image] = max(version_id, self.newest.get(image, ""))


@pytest.fixture
def forker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """What starts savers (``saver.py``)."""
    (tmp_path / "store").mkdir()
    command = [sys.executable, str(Path(__file__).with_name("saver.py")), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


def save_and_kill(forker: subprocess.Popen[str], told: list[Path], seconds: float) -> None:
    """Let as many processes as there are files to tell in save at the same time, and kill them all at once."""
    assert forker.stdin is not None and forker.stdout is not None
    forker.stdin.write(json.dumps([str(file) for file in told]) + "\n")
    forker.stdin.flush()
    savers: list[int] = json.loads(forker.stdout.readline())
    try:
        deadline = time.monotonic() + SECONDS_TO_START
        while not all(file.exists() and file.read_bytes().startswith(b"ready\n") for file in told):
            assert time.monotonic() < deadline, "one did not start"
            time.sleep(0.005)
        time.sleep(seconds)
    finally:
        for saver in savers:
            os.kill(saver, signal.SIGKILL)
        codes = json.loads(forker.stdout.readline())
    assert codes == [-signal.SIGKILL] * len(savers), "one ended by itself"


def check(folder: Path, promised: Acknowledged) -> None:
    history, leases = LabelHistory(folder / "history", folder / "labels"), Leases(folder / "history/leases.sqlite")
    try:
        found = {version.version_id: version for version in history.since(0)}
        missing = promised.digests.keys() - found.keys()
        assert not missing, f"{len(missing)} acknowledged labels are missing: {sorted(missing)[:3]}"
        assert promised.skipped <= leases.skipped().keys()
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
        leases.close()


@pytest.mark.parametrize(
    "seed", [seed if seed <= ALWAYS else pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS]
)
def test_kills_in_a_stream_of_saves_lose_nothing(seed: int, forker: subprocess.Popen[str], tmp_path: Path) -> None:
    random_source, promised, killed, folder = random.Random(seed), Acknowledged(), 0, tmp_path / "store"
    while killed < KILLS:
        savers = random_source.choice((4, 5, 6))
        told = [tmp_path / f"told-{killed + n}" for n in range(savers)]
        save_and_kill(forker, told, random_source.uniform(0, SECONDS_AT_MOST))
        for file in told:
            promised.read(file)
        killed += savers
        if killed % KILLS_BETWEEN_CHECKS < savers:
            check(folder, promised)
    check(folder, promised)
    assert len(promised.digests) > KILLS, "the kills hit too few saves to mean anything"
    assert promised.skipped
