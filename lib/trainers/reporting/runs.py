"""The folders of runs: what each has said, how far it is, and which are kept.

model/<preset>/runs/<run>/job.json       the server's: request, status, times, why it failed
                          progress.json  the training's: epoch, step, loss, Dice, time left, memory
                          cases.json     what it has begun with
                          state.pt       what it goes on from after an interruption
                          report.html, report.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.trainers.material import CASES_FILE
from lib.trainers.reporting.progress import PROGRESS_FILE
from lib.trainers.resume import STATE_FILE

JOB_FILE = "job.json"
OPEN = ("SUBMITTED", "RUNNING")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none, or half of one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


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
    return int(read_json(run_dir / PROGRESS_FILE).get("step", 0))


def prune_runs(runs: Path, keep: int) -> None:
    """Remove the oldest runs beyond ``keep``, but none that is open, and the states of those that have ended."""
    ended = [path for path in list_runs(runs) if not is_unfinished(read_json(path / JOB_FILE))]
    for path in ended[:-keep]:
        shutil.rmtree(path, ignore_errors=True)
    for path in ended[-keep:-1]:
        (path / STATE_FILE).unlink(missing_ok=True)


def _began(run_dir: Path) -> float:
    return min((path.stat().st_mtime for path in (run_dir / CASES_FILE, run_dir / JOB_FILE) if path.is_file()),
               default=0.0)  # fmt: skip
