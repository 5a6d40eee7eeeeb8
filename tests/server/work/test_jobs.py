"""Trainings that are cut off: started again, given up, written down, taken up by the next server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from filelock import Timeout

from lib.errors import TrainingError
from lib.server.work.jobs import (
    DEATHS_WITHOUT_PROGRESS,
    EXIT_NO_ROOM,
    MOST_WAITING,
    REQUEST_FILE,
    Job,
    Jobs,
    start_process,
)
from lib.server.work.journal import Journal
from lib.server.work.pause import Pause
from lib.server.work.waiting_for_room import WaitingForRoom
from lib.storage.json_files import write_json
from lib.trainers.pause import is_paused

MODEL = "tiny"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal({MODEL: tmp_path / "runs"}, "studies")


class Processes:
    """Starts lines of Python in place of jobs, one after the other; the last line again and again.

    Attributes:
        requests: that of each start.
    """

    def __init__(self, *lines: str) -> None:
        self._left = list(lines)
        self.requests: list[dict[str, object]] = []

    def start(self, job: Job, result: Path) -> subprocess.Popen[str]:
        self.requests.append(dict(job.request))
        code = self._left.pop(0) if len(self._left) > 1 else self._left[0]
        return subprocess.Popen([sys.executable, "-c", code, str(result)], stdout=subprocess.PIPE, text=True)


KILLED = "import os, signal; print('step', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
DONE = "import sys; open(sys.argv[1], 'w').write('{\"version\": 1}')"
FULL = f"print('the disk is full'); raise SystemExit({EXIT_NO_ROOM})"
FAILED = "print('TrainingError: no label'); raise SystemExit(1)"


def written(tmp_path: Path, job: Job) -> dict[str, object]:
    said: dict[str, object] = json.loads((tmp_path / "runs" / job.id / "job.json").read_text())
    return said


def test_training_that_is_killed_goes_on(journal: Journal, tmp_path: Path) -> None:
    processes = Processes(KILLED, KILLED, DONE)
    jobs = Jobs(on_change=journal.write, steps_of=journal.steps, start=processes.start)
    job = jobs.submit("train", {"model": MODEL})
    assert job.finished.wait(60)
    assert (job.status, job.result) == ("DONE", {"version": 1})
    assert [request.get("resume", False) for request in processes.requests] == [False, True, True]
    assert "the process was killed (signal 9) after step 0; it goes on from its state" in job.details
    assert written(tmp_path, job)["status"] == "DONE"


def test_training_that_dies_without_coming_further_is_given_up_with_the_reason(
    journal: Journal, tmp_path: Path
) -> None:
    processes = Processes(KILLED)
    jobs = Jobs(on_change=journal.write, steps_of=journal.steps, start=processes.start)
    job, after = jobs.submit("train", {"model": MODEL}), jobs.submit("train", {"model": MODEL}, enqueue=True)
    assert job.finished.wait(60) and after.finished.wait(60), "the queue goes on"
    assert len(processes.requests) == 2 * DEATHS_WITHOUT_PROGRESS
    assert (job.status, job.reason) == ("ERROR", "the process was killed 5 times at step 0 (signal 9, the last)")
    assert written(tmp_path, job)["reason"] == job.reason
    assert len(journal.failures(MODEL, 0)) == 2
    assert journal.failures(MODEL, time.time() + 1) == []


def test_training_that_comes_further_may_die_as_often_as_it_likes(journal: Journal, tmp_path: Path) -> None:
    processes = Processes(*[KILLED] * 9, DONE)
    steps = iter(range(1, 100))
    job = Jobs(on_change=journal.write, steps_of=lambda _: next(steps), start=processes.start).submit(
        "train", {"model": MODEL}
    )
    assert job.finished.wait(60)
    assert (job.status, len(processes.requests)) == ("DONE", 10)


def test_training_that_fails_on_its_own_is_not_started_again(journal: Journal) -> None:
    processes = Processes(FAILED)
    job = Jobs(on_change=journal.write, start=processes.start).submit("train", {"model": MODEL})
    assert job.finished.wait(60)
    assert (job.status, job.reason, len(processes.requests)) == ("ERROR", "TrainingError: no label", 1)


def test_training_that_a_full_disk_has_ended_goes_on_when_there_is_room(journal: Journal, tmp_path: Path) -> None:
    processes = Processes(FULL, FULL, DONE)
    jobs = Jobs(on_change=journal.write, steps_of=journal.steps, start=processes.start)
    job = jobs.submit("train", {"model": MODEL})
    assert job.finished.wait(60)
    assert (job.status, job.reason, job.waits_for_room) == ("ERROR", "the disk is full", True)
    assert [left.id for left in journal.unfinished()] == [job.id], "the next server takes it up"
    assert journal.failures(MODEL, 0) == [], "it has not failed"
    waiting = WaitingForRoom(jobs, journal.folder_of)
    for _ in range(2):
        waiting.look()
        assert job.finished.wait(60)
    assert (job.status, job.result, job.reason, job.waits_for_room) == ("DONE", {"version": 1}, "", False)
    assert [request.get("resume", False) for request in processes.requests] == [False, True, True]
    assert journal.unfinished() == []


@pytest.mark.parametrize("by", ["another training", "stopping"])
def test_training_that_nobody_wants_any_more_does_not_wait_for_room(by: str, journal: Journal) -> None:
    processes = Processes(FULL, DONE)
    jobs = Jobs(on_change=journal.write, start=processes.start)
    job = jobs.submit("train", {"model": MODEL})
    assert job.finished.wait(60)
    if by == "stopping":
        assert jobs.stop("train") is job
    else:
        assert jobs.submit("train", {"model": MODEL}).finished.wait(60)
    WaitingForRoom(jobs, journal.folder_of).look()
    assert job.status == "ERROR" and jobs.waiting_for_room() == journal.unfinished() == []
    assert len(processes.requests) == (1 if by == "stopping" else 2)


def leave_behind(tmp_path: Path, name: str, status: str, studies: str = "studies", pid: int = 2**22) -> None:
    job = Job("train", {"model": MODEL, "max_epochs": 3}, id=name, status=status)  # type: ignore[arg-type]
    said = job.describe() | {"studies": studies, "owner": {"pid": pid, "started": 1.0}, "deaths": 2, "step": 7}
    (tmp_path / "runs" / name).mkdir(parents=True)
    write_json(tmp_path / "runs" / name / "job.json", said)


def test_next_server_takes_up_what_was_left_in_order(journal: Journal, tmp_path: Path) -> None:
    leave_behind(tmp_path, "2-waits", "SUBMITTED")
    leave_behind(tmp_path, "1-ran", "RUNNING")
    for number, status in enumerate(("DONE", "ERROR", "STOPPED")):
        leave_behind(tmp_path, f"0-{number}", status)
    leave_behind(tmp_path, "3-elsewhere", "RUNNING", studies="other studies")
    (tmp_path / "runs" / "4-half").mkdir()
    (tmp_path / "runs" / "4-half" / "job.json").write_text("{")
    processes = Processes(DONE)
    jobs = Jobs(on_change=journal.write, steps_of=journal.steps, start=processes.start)
    jobs.recover(journal.unfinished())
    left = jobs.of("train")
    assert [job.id for job in left] == ["1-ran", "2-waits"]
    assert all(job.finished.wait(60) for job in left)
    assert [request["resume"] for request in processes.requests] == [True, True]
    assert (left[0].request["max_epochs"], left[0].deaths, left[0].step) == (3, 2, 7)
    assert journal.unfinished() == []


def test_run_of_a_server_that_lives_is_left_to_it(journal: Journal, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        import psutil

        leave_behind(tmp_path, "1-theirs", "RUNNING")
        said = json.loads((tmp_path / "runs" / "1-theirs" / "job.json").read_text())
        said["owner"] = {"pid": other.pid, "started": psutil.Process(other.pid).create_time()}
        write_json(tmp_path / "runs" / "1-theirs" / "job.json", said)
        assert journal.unfinished() == []
        other.kill()
        other.wait()
        assert [job.id for job in journal.unfinished()] == ["1-theirs"]


def test_shutting_down_leaves_a_training_to_the_next_server(journal: Journal, tmp_path: Path) -> None:
    processes = Processes("import time; time.sleep(60)")
    jobs = Jobs(on_change=journal.write, start=processes.start)
    job = jobs.submit("train", {"model": MODEL})
    deadline = time.monotonic() + 30
    while job.status != "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    jobs.shut_down()
    assert job.status == "STOPPED"
    assert written(tmp_path, job)["status"] == "RUNNING"
    stopped = Jobs(on_change=journal.write, start=processes.start)
    other = stopped.submit("train", {"model": MODEL})
    stopped.stop("train")
    assert other.finished.wait(60)
    assert written(tmp_path, other)["status"] == "STOPPED", "what somebody has stopped stays stopped"


def test_full_disk_does_not_keep_a_training_from_running(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    journal.write(Job("train", {"model": MODEL}))
    assert "the state of training" in caplog.text


def test_pause_is_asked_for_while_anybody_needs_the_gpu() -> None:
    pause = Pause()
    with pause.asked("cpu"):
        assert not is_paused(pause.file)
    with pause.asked("cuda:0"):
        with pause.asked("cuda:0"):
            assert is_paused(pause.file)
        assert is_paused(pause.file)
        os.utime(pause.file, (0, 0))
        deadline = time.monotonic() + 10
        while not is_paused(pause.file) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert is_paused(pause.file), "it is kept fresh, however long an inference takes"
    assert not pause.file.exists()


def test_training_of_another_server_on_the_same_folders_is_seen(journal: Journal, tmp_path: Path) -> None:
    """Two servers decided alike at the same moment, and trained on the same labels one after the other."""
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, text=True)
    started = psutil.Process(other.pid).create_time()
    here = {"pid": other.pid, "started": started, "host": socket.gethostname()}
    run = tmp_path / "runs" / "theirs"
    run.mkdir(parents=True)

    def write(owner: dict[str, object], status: str = "RUNNING", studies: str = "studies") -> None:
        write_json(run / "job.json", {"id": "theirs", "status": status, "studies": studies, "owner": owner,
                                      "request": {"model": MODEL}, "start_ts": ""})  # fmt: skip

    try:
        write(here)
        assert journal.others_running(MODEL)
        for owner, status, studies in ((here, "DONE", "studies"), (here, "RUNNING", "others"),
                                       ({"pid": os.getpid()}, "RUNNING", "studies")):  # fmt: skip
            write(owner, status, studies)
            assert not journal.others_running(MODEL)
        write(here | {"host": "elsewhere", "pid": 1})
        assert journal.others_running(MODEL) and not journal.unfinished(), "nobody here can tell whether it lives"
        os.utime(run / "job.json", (time.time() - 3600,) * 2)
        assert not journal.others_running(MODEL)
    finally:
        other.communicate("")
    write(here)
    assert not journal.others_running(MODEL), "its server is gone"
    assert [job.id for job in journal.unfinished()] == ["theirs"]


def test_two_servers_do_not_decide_at_the_same_time(journal: Journal, tmp_path: Path) -> None:
    other = Journal({MODEL: tmp_path / "runs"}, "studies")
    with journal.lock(MODEL), pytest.raises(Timeout):
        other.lock(MODEL).acquire(timeout=0)
    with other.lock(MODEL).acquire(timeout=0):
        pass


def test_request_that_no_pipe_takes_at_once_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process imports its libraries for seconds before it reads, and all of the server waited for it meanwhile."""
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    request = {"images": [f"case_{number}" for number in range(50_000)]}
    started: list[subprocess.Popen[str]] = []
    starting = threading.Thread(
        target=lambda: started.append(start_process(Job("batch_infer", request), tmp_path / "result.json")), daemon=True
    )
    starting.start()
    starting.join(30)
    assert started, "it waits for the process to read"
    for process in started:
        process.kill()
        process.communicate()
    assert json.loads((tmp_path / REQUEST_FILE).read_text()) == request


def test_only_so_many_jobs_wait(tmp_path: Path) -> None:
    """Beyond a hundred, the one that runs was forgotten and could not be stopped any more."""
    jobs = Jobs(start=Processes("import time; time.sleep(60)").start)
    try:
        first, *_ = [jobs.submit("scoring", {}, enqueue=True) for _ in range(MOST_WAITING + 1)]
        with pytest.raises(TrainingError, match="21 jobs of the kind scoring run or wait, the most"):
            jobs.submit("scoring", {}, enqueue=True)
        jobs.submit("batch_infer", {})
        assert jobs.stop("scoring") is first and jobs.open("scoring") == 0
    finally:
        jobs.shut_down()
