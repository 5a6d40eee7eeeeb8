"""``/runs/`` and ``/retrain/``: the progress and results of trainings, and the decisions of the retraining policy."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent

from lib.errors import NotFoundError
from lib.server.dependencies import TrainTasksDep
from lib.server.downloads import show_file
from lib.server.http.auth import AsReviewer, AsUser
from lib.server.tasks import TasksByName
from lib.server.work.retraining import Retrainer
from lib.storage.json_files import read_object
from lib.trainers.reporting.progress import read_progress
from lib.trainers.reporting.runs import JOB_FILE, OPEN, list_runs, read_job
from lib.trainers.task import UnetrTrainTask

runs_router = APIRouter(prefix="/runs", tags=["Train"])
retrain_router = APIRouter(prefix="/retrain", tags=["Train"])

SECONDS_BETWEEN_LOOKS = 0.5
# A stream ends after a while and its client reconnects, as the standard defines, since a stopping server waits for its
# open responses.
LONGEST_STREAM_SECONDS = 10.0
MILLISECONDS_TO_COME_AGAIN = 500


async def get_retrainer(request: Request) -> Retrainer:
    """The retraining policy, as a FastAPI dependency."""
    retrainer: Retrainer = request.app.state.retrainer
    return retrainer


Policy = Annotated[Retrainer, Depends(get_retrainer)]


def get_run(trainers: TrainTasksDep, user: AsUser, model: str, run: str) -> Path:
    """The run of a stream, as a dependency: once the response has begun, it cannot be refused any more."""
    return find_run(trainers, model, run)


KnownRun = Annotated[Path, Depends(get_run)]


@retrain_router.get("/", summary="What the retrain policy has decided, and why")
def retraining(policy: Policy, user: AsUser) -> dict[str, Any]:
    """For each model: whether the policy would train now, the reason, the number of new labels, its settings."""
    return policy.describe()


@retrain_router.post("/{model}", summary="Retrain now")
def retrain(trainers: TrainTasksDep, policy: Policy, user: AsReviewer, model: str) -> dict[str, Any]:
    """Start a run with the policy's recipe now; 409 if a training is running."""
    trainers.find(model)
    return policy.train_now(model, user.name)


@runs_router.get("/{model}", summary="All runs of a model that are kept")
def runs(trainers: TrainTasksDep, user: AsUser, model: str) -> list[dict[str, Any]]:
    """The state of each run, oldest first."""
    return [describe(run) for run in list_runs(trainers.find(model).runs)]


@runs_router.get("/{model}/{run}", summary="A run's state and progress")
def run_state(trainers: TrainTasksDep, user: AsUser, model: str, run: str) -> dict[str, Any]:
    """Status, reason, epoch, step, loss, Dice by label so far, remaining seconds, memory, and the resulting version."""
    return describe(find_run(trainers, model, run))


@runs_router.get("/{model}/{run}/events", summary="A run's progress as it happens", response_class=EventSourceResponse)
async def run_events(folder: KnownRun, user: AsUser) -> AsyncIterator[ServerSentEvent]:
    """Server-sent events: ``progress`` after each change, ``end`` when the run has ended."""
    last, stop = "", time.monotonic() + LONGEST_STREAM_SECONDS
    while True:
        state = await anyio.to_thread.run_sync(describe, folder)
        ended, text = state["status"] not in OPEN, json.dumps(state)
        if text != last:
            event = "end" if ended else "progress"
            yield ServerSentEvent(data=state, event=event, retry=MILLISECONDS_TO_COME_AGAIN)
        last = text
        if ended or time.monotonic() > stop:
            return
        await anyio.sleep(SECONDS_BETWEEN_LOOKS)


@runs_router.get("/{model}/{run}/report", summary="A run's report", response_class=FileResponse)
def report(trainers: TrainTasksDep, user: AsUser, model: str, run: str) -> FileResponse:
    """One HTML page: curves, scores, comparison, worst cases, data."""
    return show_file(report_file(trainers, model, run, "report.html"), "text/html")


@runs_router.get("/{model}/{run}/report.json", summary="A run's report as JSON", response_class=FileResponse)
def report_json(trainers: TrainTasksDep, user: AsUser, model: str, run: str) -> FileResponse:
    """The same as JSON."""
    return show_file(report_file(trainers, model, run, "report.json"), "application/json")


def find_run(trainers: TasksByName[UnetrTrainTask], model: str, run: str) -> Path:
    """The folder of a run.

    Raises:
        NotFoundError: if there is no such model or run.
    """
    known = {folder.name: folder for folder in list_runs(trainers.find(model).runs)}
    if run not in known:
        raise NotFoundError("run", run[:200], list(known)[-10:])
    return known[run]


def report_file(trainers: TasksByName[UnetrTrainTask], model: str, run: str, name: str) -> Path:
    """A file of a run's report.

    Raises:
        NotFoundError: if there is none, or none yet.
    """
    file = find_run(trainers, model, run) / name
    if not file.is_file():
        raise NotFoundError("report of run", run)
    return file


def describe(folder: Path) -> dict[str, Any]:
    """The state of a run as JSON data."""
    job, made = read_job(folder / JOB_FILE), read_object(folder / "report.json")
    request = job.get("request") or {}
    return {
        "run": folder.name,
        "status": job.get("status") or ("DONE" if made else "RUNNING"),
        "why": request.get("why", ""),
        "started": job.get("start_ts"),
        "ended": job.get("end_ts"),
        "failed_because": job.get("reason") or None,
        "progress": read_progress(folder) or None,
        "version": made.get("version"),
        "decision": made.get("status"),
        "reason": made.get("reason"),
    }
