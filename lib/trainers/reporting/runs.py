"""The folders of runs: their records, their progress, and which of them are kept.

model/<preset>/runs/<run>/job.json       written by the server: request, status, times, error
                          progress.json  written by the training: epoch, step, loss, Dice, time left, memory
                          cases.json     cases with which it began state.pt       state from which it resumes after an
                          interruption report.html, report.json
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lib.storage.json_files import read_json
from lib.trainers.material import CASES_FILE
from lib.trainers.reporting.progress import read_progress
from lib.trainers.resume import STATE_FILE

logger = logging.getLogger("unetr.train")

JOB_FILE = "job.json"
OPEN = ("SUBMITTED", "RUNNING")


class _Owner(BaseModel):
    """The server process that started a job."""

    model_config = ConfigDict(strict=True)

    pid: Annotated[int, Field(ge=0, lt=2**31)] = 0
    started: float = 0.0
    host: str = ""


class _JobRecord(BaseModel):
    """The fields of ``job.json`` on which other code relies; the file may contain further ones."""

    model_config = ConfigDict(strict=True)

    id: str = ""
    status: str = ""
    request: dict[str, Any] = {}
    start_ts: str = ""
    end_ts: str = ""
    reason: str = ""
    studies: str = ""
    deaths: int = 0
    step: int = 0
    waits_for_room: bool = False
    owner: _Owner = _Owner()


def read_job(file: Path) -> dict[str, Any]:
    """The record of a job, which the server has written; empty if there is none.

    A damaged record is returned as a job that failed with this error.
    """
    try:
        data: dict[str, Any] = read_json(file)
        _JobRecord.model_validate(data)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be used: %s", file, str(error).splitlines()[0])
        return {"status": "ERROR", "reason": f"its {file.name} is damaged"}
    return data


def is_unfinished(job: Mapping[str, Any]) -> bool:
    """Whether a run is running or will run: it may wait for its turn, or for space on the disk.

    Args:
        job: content of ``job.json``.
    """
    return job.get("status") in OPEN or bool(job.get("waits_for_room"))


def list_runs(runs: Path) -> list[Path]:
    """Folders of runs, oldest first.

    Args:
        runs: ``model/<preset>/runs``.
    """
    folders = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    known = [path for path in folders if (path / JOB_FILE).is_file() or (path / CASES_FILE).is_file()]
    return sorted(known, key=lambda path: (_began(path), path.name))


def steps_done(run_dir: Path) -> int:
    """Number of steps that a run has reported."""
    return int(read_progress(run_dir).get("step", 0))


def prune_runs(runs: Path, keep: int) -> None:
    """Remove the oldest finished runs beyond ``keep``, and the stored states of finished runs."""
    ended = [path for path in list_runs(runs) if not is_unfinished(read_job(path / JOB_FILE))]
    for path in ended[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in ended[-keep:-1]:
        (path / STATE_FILE).unlink(missing_ok=True)


def _began(run_dir: Path) -> float:
    return min((path.stat().st_mtime for path in (run_dir / CASES_FILE, run_dir / JOB_FILE) if path.is_file()),
               default=0.0)  # fmt: skip
