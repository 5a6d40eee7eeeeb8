"""Stored states of trainings and batches, by which interrupted ones resume after a restart of the server."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from lib.errors import TrainingError
from lib.server.work.jobs import Job
from lib.storage.json_files import write_json
from lib.trainers.reporting.runs import JOB_FILE, OPEN, is_unfinished, list_runs, read_job, steps_done

logger = logging.getLogger("unetr.server")

LOCK_FILE = "deciding.lock"
TAKING_LOCK = "taking-over.lock"
SECONDS_OF_SILENCE = 900.0
BATCHES = "batches"
"""Folder next to a model's runs: a file for each unfinished batch inference."""


class Journal:
    """Stores each training's state in its run folder, and which batch inferences are unfinished.

    Args:
        folders: ``model/<preset>/runs`` by model.
        studies: identifier of the studies; servers with other studies ignore these runs.
    """

    def __init__(self, folders: dict[str, Path], studies: str) -> None:
        self._folders, self._studies = folders, studies
        own = psutil.Process()
        self._owner = {"pid": own.pid, "started": own.create_time(), "host": socket.gethostname()}

    def write(self, job: Job) -> None:
        """Store a training's state, or an unfinished batch; a full disk is logged, and the job continues."""
        if job.kind == "batch_infer":
            self._write_batch(job)
        if job.kind != "train":
            return
        folder = self.folder_of(job)
        payload = job.describe() | {"model": job.request["model"], "studies": self._studies, "owner": self._owner}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / JOB_FILE, payload | {"deaths": job.deaths, "step": job.step, "reason": job.reason})
        except OSError as error:
            logger.error("the state of training %s cannot be kept: %s", job.id, error)

    def _write_batch(self, job: Job) -> None:
        file = self._folders[job.request["model"]].parent / BATCHES / f"{job.id}.json"
        try:
            if not job.is_open:
                file.unlink(missing_ok=True)
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, job.describe() | {"kind": job.kind, "studies": self._studies, "owner": self._owner})
        except OSError as error:
            logger.error("the state of batch inference %s cannot be kept: %s", job.id, error)

    def unfinished(self) -> list[Job]:
        """Trainings and batches that a server which no longer runs has left, oldest first."""
        jobs = [_as_job(data) for runs in self._folders.values() for _, data in self._left(runs)]
        return sorted(jobs, key=lambda job: job.id)

    def take_over(self) -> list[Job]:
        """Claim unfinished jobs for this server: of several servers that start at once, one gets each."""
        taken = []
        for runs in self._folders.values():
            if not self._left(runs):
                continue
            with FileLock(runs.parent / TAKING_LOCK):
                for file, data in self._left(runs):
                    self._claim(file, data)
                    taken.append(_as_job(data))
        return sorted(taken, key=lambda job: job.id)

    def _left(self, runs: Path) -> list[tuple[Path, dict[str, Any]]]:
        """The files of jobs whose server no longer runs, and their content."""
        files = [run / JOB_FILE for run in list_runs(runs)] + sorted((runs.parent / BATCHES).glob("*.json"))
        records = [(file, data) for file in files if {"id", "request", "start_ts"} <= (data := read_job(file)).keys()]
        return [(file, data) for file, data in records if is_unfinished(data) and self._is_orphan(data)]

    def _is_orphan(self, data: dict[str, Any]) -> bool:
        owner = data.get("owner") or {}
        return data.get("studies") == self._studies and not (_is_of_another_machine(owner) or _lives(owner))

    def _claim(self, file: Path, data: dict[str, Any]) -> None:
        try:
            write_json(file, data | {"owner": self._owner})
        except OSError as error:
            logger.error("%s goes on here, which cannot be written down: %s", data["id"], error)

    def others_running(self, model: str) -> bool:
        """Whether another server trains this model on the same studies.

        For a server on another machine, only its files show this: a run that has written no file for a while has ended.
        """
        for run in list_runs(self._folders[model]):
            data = read_job(run / JOB_FILE)
            if data.get("status") not in OPEN or data.get("studies") != self._studies:
                continue
            owner = data.get("owner") or {}
            if _is_of_another_machine(owner):
                if _seconds_since_written(run) < SECONDS_OF_SILENCE:
                    return True
            elif _lives(owner):
                return True
        return False

    def check_alone(self, model: str) -> None:
        """Refuse a training while another server trains the model on the same studies.

        Raises:
            TrainingError: if another server trains it.
        """
        if self.others_running(model):
            raise TrainingError(
                f"another server trains {model!r} on the same studies; wait for it, or stop it there: its labels "
                "would be trained on twice"
            )

    def lock(self, model: str) -> FileLock:
        """A lock for the decision on a training of this model, which serialises servers."""
        self._folders[model].mkdir(parents=True, exist_ok=True)
        return FileLock(self._folders[model] / LOCK_FILE)

    def failures(self, model: str, since: float) -> list[float]:
        """Times of failed trainings of a model since a time."""
        runs = [run / JOB_FILE for run in list_runs(self._folders[model])]
        records = [(path, read_job(path)) for path in runs]
        ended = [
            p.stat().st_mtime for p, record in records if record.get("status") == "ERROR" and not is_unfinished(record)
        ]
        return sorted(when for when in ended if when > since)

    def folder_of(self, job: Job) -> Path:
        """The folder of the run."""
        return self._folders[job.request["model"]] / job.id

    def steps(self, job: Job) -> int:
        """The progress of a training."""
        return steps_done(self.folder_of(job))


def _as_job(data: dict[str, Any]) -> Job:
    if data.get("kind") == "batch_infer":
        return Job("batch_infer", dict(data["request"]), id=str(data["id"]), start_ts=str(data["start_ts"]))
    job = Job("train", dict(data["request"]) | {"resume": True}, id=str(data["id"]), start_ts=str(data["start_ts"]))
    job.deaths, job.step = int(data.get("deaths", 0)), int(data.get("step", 0))
    return job


def _is_of_another_machine(owner: dict[str, Any]) -> bool:
    return str(owner.get("host", socket.gethostname())) != socket.gethostname()


def _seconds_since_written(run: Path) -> float:
    """Time since the newest file of a run was written."""
    return time.time() - max((path.stat().st_mtime for path in run.iterdir() if path.is_file()), default=0.0)


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the server that wrote the record still runs, and its process id was not reused."""
    try:
        return bool(owner["pid"] != os.getpid() and abs(_started(owner["pid"]) - owner["started"]) < 1)
    except (psutil.NoSuchProcess, KeyError):
        return False


def _started(pid: int) -> float:
    return float(psutil.Process(pid).create_time())
