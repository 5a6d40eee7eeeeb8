"""What a server that is started finds of the work that one before it has left."""

from __future__ import annotations

from pathlib import Path

import psutil

from lib.server.work.jobs import Job
from lib.server.work.journal import BATCHES, Journal
from lib.storage.json_files import read_object, write_json

GONE = {"pid": 2**22 + 1, "started": 1.0}


def _batch(status: str) -> Job:
    return Job("batch_infer", {"model": "tiny", "begun_at": "2026-01-01T00:00:00.000+00:00"}, status=status)


def _forget_owner(file: Path) -> None:
    """As if the server that wrote it was gone."""
    write_json(file, read_object(file) | {"owner": GONE})


def test_open_batch_of_a_server_that_is_gone_is_found_with_its_request(tmp_path: Path) -> None:
    journal, job = Journal({"tiny": tmp_path / "tiny" / "runs"}, "studies"), _batch("RUNNING")
    journal.write(job)
    file = tmp_path / "tiny" / BATCHES / f"{job.id}.json"
    _forget_owner(file)
    (found,) = journal.unfinished()
    assert (found.kind, found.id, found.request, found.status) == ("batch_infer", job.id, job.request, "SUBMITTED")
    assert Journal({"tiny": tmp_path / "tiny" / "runs"}, "others").unfinished() == []
    journal.write(_ended(job))
    assert not file.exists()


def test_batch_of_a_server_that_lives_is_left_to_it(tmp_path: Path) -> None:
    journal, job = Journal({"tiny": tmp_path / "tiny" / "runs"}, "studies"), _batch("SUBMITTED")
    journal.write(job)
    parent = psutil.Process().parent()
    assert parent is not None
    file = tmp_path / "tiny" / BATCHES / f"{job.id}.json"
    write_json(file, read_object(file) | {"owner": {"pid": parent.pid, "started": parent.create_time()}})
    assert journal.unfinished() == []


def _ended(job: Job) -> Job:
    job.status = "DONE"
    return job
