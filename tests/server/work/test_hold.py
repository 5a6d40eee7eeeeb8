"""A job is told to wait while somebody infers, and hears it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from lib.activelearning.pool_scoring import MAY_COMPUTE
from lib.server.work import job_process
from lib.server.work.jobs import Job, Jobs

ECHO = "import sys\nfor word in iter(lambda: sys.stdin.read(1), '.'): print(word, flush=True)"


def start_echo(job: Job, result: Path) -> subprocess.Popen[str]:
    """A job that prints what it is told until it is told a full stop."""
    return subprocess.Popen(
        [sys.executable, "-c", ECHO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT
    )


def wait_for(details: object, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(details) < count and time.monotonic() < deadline:  # type: ignore[arg-type]
        time.sleep(0.02)


def test_job_is_told_to_hold_and_to_go_on_also_when_it_starts_later() -> None:
    runner = Jobs(start=start_echo)
    runner.hold("scoring", True)
    job = runner.submit("scoring", {})
    wait_for(job.details, 1)
    runner.hold("scoring", False)
    wait_for(job.details, 2)
    runner.hold("train", True)  # nobody's
    assert list(job.details) == ["-", "+"]
    assert job.process is not None and job.process.stdin is not None
    job.process.stdin.write(".")
    job.process.stdin.close()
    assert job.finished.wait(30)
    assert job.process.stdout is not None
    job.process.stdout.close()
    runner.hold("scoring", True)  # it has ended: nothing happens
    runner.shut_down()


def test_process_hears_it_and_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[bool] = []
    told = iter([b"-", b"+", b"+-", b"-+", b""])

    def read(descriptor: int, size: int) -> bytes:
        heard.append(MAY_COMPUTE.is_set())
        return next(told)

    ended: list[int] = []
    monkeypatch.setattr(job_process.os, "read", read)
    monkeypatch.setattr(job_process.os, "_exit", ended.append)
    # the tests' own children, a server among them, are not this job's to end
    monkeypatch.setattr(job_process.psutil.Process, "children", lambda self, recursive: [])
    try:
        job_process._end_with_server()
    finally:
        MAY_COMPUTE.set()
    assert heard == [True, False, True, False, True]
    assert ended == [job_process.EXIT_SERVER_GONE]
