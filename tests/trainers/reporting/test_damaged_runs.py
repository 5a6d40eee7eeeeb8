"""Files of runs that somebody damaged: nothing is known of the run then, and nothing else suffers from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib.trainers.judging.publishing import STATS_FILE, read_stats
from lib.trainers.reporting.progress import CURVE_FILE, PROGRESS_FILE, read_curve, read_progress
from lib.trainers.reporting.runs import JOB_FILE, is_unfinished, read_job, steps_done

JOB = {
    "id": "1", "status": "RUNNING", "request": {"model": "tiny"}, "start_ts": "2026-01-01", "studies": "/studies",
    "owner": {"pid": 5, "started": 1.5, "host": "here"}, "deaths": 0, "step": 3, "reason": "", "details": ["a"],
}  # fmt: skip
PROGRESS = {
    "epoch": 1, "max_epochs": 2, "step": 3, "total_steps": 6, "loss": None, "learning_rate": 0.1, "eta_seconds": 2,
    "dice": {"core": 0.5, "Left Box": None}, "best_mean_dice": None, "memory": {}, "plan": "",
}  # fmt: skip
DAMAGED = ("", "{", "[]", "5", "null", "\x00\xff", "[" * 100_000)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_job(tmp_path / JOB_FILE) == read_progress(tmp_path) == {}
    (tmp_path / JOB_FILE).write_text(json.dumps(JOB))
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(PROGRESS))
    assert read_job(tmp_path / JOB_FILE) == JOB and read_progress(tmp_path) == PROGRESS
    assert is_unfinished(read_job(tmp_path / JOB_FILE)) and steps_done(tmp_path) == 3


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_files_are_a_run_that_has_ended(tmp_path: Path, text: str) -> None:
    for name in (JOB_FILE, PROGRESS_FILE, CURVE_FILE):
        (tmp_path / name).write_text(text, encoding="latin-1")
    job = read_job(tmp_path / JOB_FILE)
    assert job == {"status": "ERROR", "reason": "its job.json is damaged"} and not is_unfinished(job)
    assert read_progress(tmp_path) == {} and read_curve(tmp_path) == [] and steps_done(tmp_path) == 0


@pytest.mark.parametrize(
    "change",
    [{"status": 5}, {"status": None}, {"request": "x"}, {"request": []}, {"owner": "x"}, {"deaths": 1e308},
     {"step": "3"}, {"start_ts": {}}, {"studies": ["/"]}, {"waits_for_room": "yes"}],
    ids=str,
)  # fmt: skip
def test_job_of_wrong_types_has_ended(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / JOB_FILE).write_text(json.dumps(JOB | change))
    assert read_job(tmp_path / JOB_FILE) == {"status": "ERROR", "reason": "its job.json is damaged"}


@pytest.mark.parametrize("owner", [{"pid": "5"}, {"pid": 10**30}, {"pid": -1}, {"started": []}, {"host": 5}])
def test_job_of_an_owner_that_none_can_be_has_ended(tmp_path: Path, owner: dict[str, object]) -> None:
    (tmp_path / JOB_FILE).write_text(json.dumps(JOB | {"owner": owner}))
    assert read_job(tmp_path / JOB_FILE)["status"] == "ERROR"


@pytest.mark.parametrize("value", ["x", [], {"a": "b"}, True], ids=str)
@pytest.mark.parametrize("key", ["epoch", "step", "loss", "dice", "best_mean_dice"])
def test_progress_of_wrong_types_is_none(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(PROGRESS | {key: value}))
    assert read_progress(tmp_path) == {}


@pytest.mark.parametrize("change", [{"epoch": -1}, {"total_steps": 10**30}, {"plan": "\ud800"}], ids=str)
def test_progress_that_none_can_be_is_none(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / PROGRESS_FILE).write_text(json.dumps(PROGRESS | change))
    assert read_progress(tmp_path) == {}


STATS = {"epoch": 3, "max_epochs": 3, "total_time": "3s", "best_metric": 0.5, "version": "v0001"}


@pytest.mark.parametrize(
    "text",
    [
        *DAMAGED,
        *(json.dumps(STATS | change) for change in ({"epoch": "3"}, {"total_epochs": 0}, {"total_time": {}})),
        json.dumps(STATS)[:-1] + ', "best_metric": NaN}',
        json.dumps(STATS | {"reason": "\ud800"}),
    ],
)
def test_damaged_figures_of_the_last_run_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / STATS_FILE).write_text(json.dumps(STATS))
    assert read_stats(tmp_path) == STATS
    (tmp_path / STATS_FILE).write_text(text, encoding="latin-1")
    assert read_stats(tmp_path) == {}


def test_curve_keeps_the_lines_that_are_points(tmp_path: Path) -> None:
    (tmp_path / CURVE_FILE).write_text("1,0.5\n2,nan\nx,1\n3,lots\n4,1e-05\n5,\n\u0663,1\n6,1,2\n7,inf\n", "utf-8")
    found = dict(read_curve(tmp_path))
    assert found.keys() == {1, 2, 4, 7} and found[4] == 1e-5
