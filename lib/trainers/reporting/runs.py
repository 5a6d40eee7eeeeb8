"""The folders of runs: what each has said, how far it is, and which are kept.

model/<preset>/runs/<run>/job.json       the server's: request, status, times, why it failed
                          progress.json  the training's: epoch, step, loss, Dice, time left, memory
                          cases.json     what it has begun with
                          state.pt       what it goes on from after an interruption
                          report.html, report.json
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
    """The server's process that a job is of."""

    model_config = ConfigDict(strict=True)

    pid: Annotated[int, Field(ge=0, lt=2**31)] = 0
    started: float = 0.0
    host: str = ""


class _JobRecord(BaseModel):
    """What others rely on in ``job.json``; more may stand there."""

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
    """What a job's file says, which the server has written; empty where there is none.

    A damaged one is a job that has ended in an error, which says so.
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
    """Whether a run goes on, or will: it waits for its turn, or for room on the disk.

    Args:
        job: what ``job.json`` says.
    """
    return job.get("status") in OPEN or bool(job.get("waits_for_room"))


def list_runs(runs: Path) -> list[Path]:
    """Folders of runs, the oldest first.

    Args:
        runs: ``model/<preset>/runs``.
    """
    folders = [path for path in runs.iterdir() if path.is_dir()] if runs.is_dir() else []
    known = [path for path in folders if (path / JOB_FILE).is_file() or (path / CASES_FILE).is_file()]
    return sorted(known, key=lambda path: (_began(path), path.name))


def steps_done(run_dir: Path) -> int:
    """How many steps a run has reported."""
    return int(read_progress(run_dir).get("step", 0))


def prune_runs(runs: Path, keep: int) -> None:
    """Remove the oldest runs beyond ``keep``, but none that is open, and the states of those that have ended."""
    ended = [path for path in list_runs(runs) if not is_unfinished(read_job(path / JOB_FILE))]
    for path in ended[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in ended[-keep:-1]:
        (path / STATE_FILE).unlink(missing_ok=True)


def _began(run_dir: Path) -> float:
    return min((path.stat().st_mtime for path in (run_dir / CASES_FILE, run_dir / JOB_FILE) if path.is_file()),
               default=0.0)  # fmt: skip
