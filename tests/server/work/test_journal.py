"""What a server that is started finds of the work that one before it has left."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import psutil
import pytest

from lib.errors import TrainingError
from lib.server.services import place_of
from lib.server.work.jobs import Job
from lib.server.work.journal import BATCHES, Journal
from lib.storage.json_files import read_object, write_json
from lib.trainers.reporting.runs import JOB_FILE

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


def _serve(runs: Path, begin: Any, end: Any, taken: Any) -> None:
    journal = Journal({"tiny": runs}, "studies")
    begin.wait()
    taken.put([job.id for job in journal.take_over()])
    end.wait()


def test_of_two_servers_that_start_at_once_one_takes_up_what_was_left(tmp_path: Path) -> None:
    """After a power cut both went on with the same run, in the same folder."""
    runs = tmp_path / "tiny" / "runs"
    training, batch = Job("train", {"model": "tiny"}, status="RUNNING"), _batch("RUNNING")
    for job, file in ((training, runs / training.id / JOB_FILE), (batch, runs.parent / BATCHES / f"{batch.id}.json")):
        Journal({"tiny": runs}, "studies").write(job)
        _forget_owner(file)
    context = multiprocessing.get_context("fork")
    begin, end, taken = context.Barrier(2), context.Event(), context.Queue()
    servers = [context.Process(target=_serve, args=(runs, begin, end, taken), daemon=True) for _ in range(2)]
    for server in servers:
        server.start()
    said = [*taken.get(timeout=60), *taken.get(timeout=60)]
    assert Journal({"tiny": runs}, "studies").take_over() == [], "they live"
    end.set()
    for server in servers:
        server.join(60)
    assert sorted(said) == sorted([training.id, batch.id])


def test_training_is_refused_while_another_server_trains_on_the_same_studies(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    journal, job = Journal({"tiny": runs}, "studies"), Job("train", {"model": "tiny"}, status="RUNNING")
    journal.write(job)
    journal.check_alone("tiny")
    parent = psutil.Process().parent()
    assert parent is not None
    file = runs / job.id / JOB_FILE
    write_json(file, read_object(file) | {"owner": {"pid": parent.pid, "started": parent.create_time()}})
    with pytest.raises(TrainingError, match="another server trains 'tiny' on the same studies"):
        journal.check_alone("tiny")


def test_studies_are_the_same_by_whatever_path(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "studies")
    assert place_of(f"{tmp_path}/link") == place_of(f"{tmp_path}/./studies/") == str((tmp_path / "studies").resolve())
    assert place_of("http://pacs/dicom-web") == "http://pacs/dicom-web"


def _ended(job: Job) -> Job:
    job.status = "DONE"
    return job
