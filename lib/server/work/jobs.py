"""Runs long work (training, batch inference, scoring) in separate processes, one at a time of each kind.

Its interface is that of MONAI Label's own runner, which has gaps: there, a waiting job cannot be stopped, the last
lines of output can be lost, and a training continues after the server has ended, and publishes. Here, the process of a
job ends with the server, for whatever reason the server ends: it reads a pipe that only the server holds open
(``job_process``). An interrupted training resumes from its state: at once if only its process was killed, and after the
next start if the server was.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import psutil

from lib.errors import TrainingError
from lib.storage.full_disk import storage_problem
from lib.storage.json_files import read_json

logger = logging.getLogger("unetr.server")

Kind = Literal["train", "batch_infer", "scoring"]
KINDS: tuple[Kind, ...] = ("train", "batch_infer", "scoring")
Status = Literal["SUBMITTED", "RUNNING", "DONE", "ERROR", "STOPPED"]
KEPT_LINES = 20
KEPT_JOBS = 100
MOST_WAITING = 20
LONGEST_LINE = 1000
SECONDS_TO_END = 5.0
DEATHS_WITHOUT_PROGRESS = 5
COULD_NOT_RUN = "the server could not run this to its end; its log has the reason"
EXIT_NO_ROOM = 4
"""Exit code of a job's process if the disk is full."""
REPOSITORY = Path(__file__).resolve().parents[3]
REQUEST_FILE = "request.json"
# Commands to a job on its standard input.
HOLD, GO_ON = "-", "+"


@dataclass
class Job:
    """A job.

    Attributes:
        deaths: how often its process was killed since its last progress.
        step: its progress when its process was last started.
        reason: why it failed.
        waits_for_room: whether a full disk has stopped it, so that it resumes when there is space.
    """

    kind: Kind
    request: dict[str, Any]
    id: str = field(default_factory=lambda: f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}")
    status: Status = "SUBMITTED"
    start_ts: str = field(default_factory=lambda: _now())
    end_ts: str | None = None
    details: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    result: Any = None
    finished: threading.Event = field(default_factory=threading.Event)
    process: subprocess.Popen[str] | None = None
    deaths: int = 0
    step: int = 0
    reason: str = ""
    waits_for_room: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it is running or waiting."""
        return self.status in ("SUBMITTED", "RUNNING")

    def describe(self) -> dict[str, Any]:
        """The JSON that MONAI Label's clients read."""
        payload: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "request": self.request,
            "start_ts": self.start_ts,
        }
        payload |= {"details": list(self.details)} if self.status != "SUBMITTED" else {}
        payload |= {"reason": self.reason} if self.reason else {}
        payload |= {"waits_for_room": True} if self.waits_for_room else {}
        return payload | ({"end_ts": self.end_ts} if self.end_ts else {})


class Jobs:
    """All jobs of one server.

    Args:
        on_end: called with each finished job, in the thread that ran it.
        on_output: called with each job that printed a line.
        before_end: the same, before the end of the job is visible to others.
        on_change: called with each job whose status has changed.
        steps_of: the progress of a training.
        start: starts a job's process, which writes its result to a file.
    """

    def __init__(
        self,
        on_end: Callable[[Job], None] | None = None,
        before_end: Callable[[Job], None] | None = None,
        on_output: Callable[[Job], None] | None = None,
        on_change: Callable[[Job], None] | None = None,
        steps_of: Callable[[Job], int] | None = None,
        start: Callable[[Job, Path], subprocess.Popen[str]] | None = None,
    ) -> None:
        self._jobs: dict[Kind, deque[Job]] = {}
        self._threads: dict[Kind, ThreadPoolExecutor] = {}
        self._lock = threading.Lock()
        self._on_end, self._before_end = on_end, before_end
        self._on_output = on_output or (lambda _: None)
        self._held: set[Kind] = set()
        self._on_change = on_change or (lambda _: None)
        self._steps_of = steps_of or (lambda _: 0)
        self._start_process = start or start_process
        self._closing = False

    def submit(self, kind: Kind, request: Mapping[str, Any], enqueue: bool = False) -> Job:
        """Start a job, or let it wait for those before it.

        Raises:
            TrainingError: if one is running and ``enqueue`` is not given, or if too many wait.
        """
        with self._lock:
            jobs = self._jobs.setdefault(kind, deque(maxlen=KEPT_JOBS))
            inside = sum(job.is_open for job in jobs)
            if inside and not enqueue:
                raise TrainingError(f"a {_words(kind)} runs already; stop it, wait for it, or send enqueue=true")
            if inside > MOST_WAITING:
                raise TrainingError(
                    f"{inside} jobs of the kind {_words(kind)} run or wait, the most; stop them or wait"
                )
            job = Job(kind, dict(request))
            jobs.append(job)
        for waiting in self.waiting_for_room():
            if waiting.request.get("model") == job.request.get("model"):
                self._wait_no_longer(waiting)  # the new job trains on all labels
        self._start(job)
        return job

    def waiting_for_room(self) -> list[Job]:
        """The trainings that a full disk has stopped, and that resume when there is space."""
        return [job for job in self.of("train") if job.waits_for_room]

    def go_on(self, job: Job) -> None:
        """Restart a training that waits for disk space; it resumes from its state."""
        with self._lock:
            if self._closing or not job.waits_for_room:
                return
            job.waits_for_room, job.status, job.end_ts, job.reason = False, "SUBMITTED", None, ""
            job.request["resume"], job.finished, job.process = True, threading.Event(), None
        job.details.append("there is room on the disk again, and the training goes on")
        logger.info("training %s: %s", job.id, job.details[-1])
        self._start(job)

    def _wait_no_longer(self, job: Job) -> None:
        job.waits_for_room = False
        self._on_change(job)

    def recover(self, jobs: Iterable[Job]) -> None:
        """Resume the jobs that an earlier server left unfinished."""
        for job in jobs:
            with self._lock:
                self._jobs.setdefault(job.kind, deque(maxlen=KEPT_JOBS)).append(job)
            logger.info("%s %s goes on", _words(job.kind), job.id)
            self._start(job)

    def _start(self, job: Job) -> None:
        self._on_change(job)
        with self._lock:
            thread = self._threads.setdefault(job.kind, ThreadPoolExecutor(1, thread_name_prefix=job.kind))
        thread.submit(self._run, job)

    def of(self, kind: Kind) -> list[Job]:
        """All remembered jobs of a kind, oldest first."""
        with self._lock:
            return list(self._jobs.get(kind, ()))

    def open(self, kind: Kind) -> int:
        """Number of running and waiting jobs of a kind."""
        return sum(job.is_open for job in self.of(kind))

    def current(self, kind: Kind) -> Job | None:
        """The running job, or otherwise the first waiting one."""
        is_open = [job for job in self.of(kind) if job.is_open]
        return next((job for job in is_open if job.status == "RUNNING"), is_open[0] if is_open else None)

    def stop(self, kind: Kind) -> Job | None:
        """Stop the running job and all waiting ones; returns the first of them, None if there is none."""
        waiting = [job for job in self.of(kind) if job.waits_for_room]
        current = self.current(kind) or next(iter(waiting), None)
        for job in reversed(self.of(kind)):  # waiting jobs first, or the next one would start
            self._stop(job)
        for job in waiting if not self._closing else ():
            self._wait_no_longer(job)
        return current

    def hold(self, kind: Kind, held: bool) -> None:
        """Pause or resume the running job of a kind; this affects only jobs that check for it (see ``job_process``)."""
        with self._lock:
            (self._held.add if held else self._held.discard)(kind)
        job = self.current(kind)
        if job is not None and job.process is not None:
            _tell(job.process, HOLD if held else GO_ON)

    def shut_down(self) -> None:
        """Stop all jobs and start no others; the stored state of a training is kept, so that it can resume later."""
        with self._lock:
            self._closing = True
            threads = list(self._threads.values())
        for thread in threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for kind in list(self._jobs):
            self.stop(kind)
        for thread in threads:
            thread.shutdown(wait=True)

    def _stop(self, job: Job) -> None:
        with self._lock:
            if not job.is_open:
                return
            job.status, job.end_ts, process = "STOPPED", _now(), job.process
        if process is None:
            job.finished.set()
        else:
            end_tree(process)
        if not self._closing:
            self._on_change(job)
        logger.info("stopped %s %s", _words(job.kind), job.id)

    def _run(self, job: Job) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="unetr-job-") as folder:
                while (code := self._run_process(job, Path(folder) / "result.json")) is not None:
                    if not self._goes_on(job, code):
                        self._conclude(job, code)
                        break
        except Exception as error:
            problem = storage_problem(error)
            logger.log(
                logging.WARNING if problem else logging.ERROR,
                "%s %s could not be run to its end: %s", _words(job.kind), job.id, error,
                exc_info=None if problem else error,
            )  # fmt: skip
            job.details.append(sentence_of(job.kind, problem) if problem else COULD_NOT_RUN)
            self._conclude(job, EXIT_NO_ROOM if problem else 1)
        finally:
            job.finished.set()

    def _run_process(self, job: Job, result: Path) -> int | None:
        """Run a job's process to its end; returns its exit code, None for a job that was stopped before."""
        with self._lock:
            if not job.is_open:
                return None
            process = self._start_process(job, result)
            job.process, job.status = process, "RUNNING"
            if job.kind in self._held:
                _tell(process, HOLD)
        self._on_change(job)
        lines = logging.getLogger(f"task_{job.kind}")  # MONAI Label's logging configuration has a place for these
        for line in process.stdout or ():
            if text := line.strip()[:LONGEST_LINE]:
                lines.info("%s", text)
                job.details.append(text)
                self._on_output(job)
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        if code == 0 and result.is_file():
            job.result = read_json(result)
        return code

    def _goes_on(self, job: Job, code: int) -> bool:
        """Whether a training whose process was killed is restarted; one that failed by itself is not."""
        if job.kind != "train" or code >= 0 or not job.is_open or self._closing:
            return False
        steps = self._steps_of(job)
        job.deaths = 1 if steps > job.step else job.deaths + 1
        job.step = steps
        if job.deaths >= DEATHS_WITHOUT_PROGRESS:
            job.details.append(f"the process was killed {job.deaths} times at step {steps} (signal {-code}, the last)")
            return False
        job.details.append(f"the process was killed (signal {-code}) after step {steps}; it goes on from its state")
        logger.warning("training %s: %s", job.id, job.details[-1])
        job.request["resume"] = True
        return True

    def _conclude(self, job: Job, code: int) -> None:
        if self._before_end is not None:
            self._before_end(job)
        with self._lock:
            if job.is_open:
                job.waits_for_room = code == EXIT_NO_ROOM and job.kind == "train"
                job.status, job.end_ts = "DONE" if code == 0 else "ERROR", _now()
                job.reason = "" if code == 0 else job.details[-1] if job.details else f"it ended with {code}"
        logger.info("%s %s ended: %s", _words(job.kind), job.id, job.status)
        if not self._closing:
            self._on_change(job)
        if self._on_end is not None:
            self._on_end(job)


def sentence_of(kind: Kind, problem: str) -> str:
    """The message for a job whose files could not be written.

    Args:
        kind: kind of the job.
        problem: the reason, from :func:`lib.storage.full_disk.storage_problem`.
    """
    cause = f"{problem}, and the {_words(kind)} ended"
    return f"{cause}; it goes on from its state when there is room" if kind == "train" else f"{cause}; make room for it"


def start_process(job: Job, result: Path) -> subprocess.Popen[str]:
    """Start a job's process; its standard input stays open as long as this server runs.

    The request is written to a file beside that of the result: a pipe takes 64 KiB, and for a larger request the server
    would wait until the process has imported its libraries.

    Raises:
        OSError: if the request cannot be written.
    """
    # CUDA_VISIBLE_DEVICES has chosen the GPUs already, and counts them from 0 again.
    request = job.request | ({"gpus": "all"} if "gpus" in job.request else {})
    request |= {"run": job.id} if job.kind == "train" else {}
    result.with_name(REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "lib.server.work.job_process", job.kind, str(result)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=_environment(job),
    )


def _tell(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(word)
        process.stdin.flush()
    except (OSError, ValueError):
        logger.debug("process %d was sent %r after its end", process.pid, word)


def end_tree(process: subprocess.Popen[str]) -> None:
    """Terminate a process and its descendants, and kill those that are left after five seconds."""
    try:
        parent = psutil.Process(process.pid)
        tree = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in tree:
        _signal(member.terminate)
    _, alive = psutil.wait_procs(tree[1:], timeout=SECONDS_TO_END)
    try:
        process.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        alive.append(parent)
    for member in alive:
        _signal(member.kill)


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return


def _environment(job: Job) -> dict[str, str]:
    environment = {**os.environ, "MONAI_LABEL_DATASTORE_AUTO_RELOAD": "false", "PYTHONUNBUFFERED": "1"}
    environment["PYTHONUTF8"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    gpus = str(job.request.get("gpus") or "all")
    if gpus == "all":
        return environment
    # the process counts what it sees from 0, so that names of devices do not mean what they mean here
    conf = json.loads(environment.get("MONAI_LABEL_APP_CONF") or "{}")
    conf = {key: value for key, value in conf.items() if key not in ("device", "devices")}
    environment["MONAI_LABEL_APP_CONF"] = json.dumps(conf | {"devices": "all"})
    return environment | {"CUDA_VISIBLE_DEVICES": gpus}


def _now() -> str:
    return datetime.now().strftime("%Y-%m-%d %H:%M:%S")


def _words(kind: Kind) -> str:
    return {"train": "training", "batch_infer": "batch inference", "scoring": "scoring"}[kind]
