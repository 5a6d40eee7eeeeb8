"""What the operating system tells of the folders of images and labels, and what is passed on."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from pathlib import Path

import pytest
from watchdog.events import FileCreatedEvent, FileModifiedEvent, FileMovedEvent, FileSystemEvent
from watchdog.observers import Observer

from lib.datastore.images.events import FolderEvents, listen

SECONDS = 20


@pytest.fixture
def calls() -> queue.Queue[str]:
    return queue.Queue()


@pytest.fixture
def handler(calls: queue.Queue[str]) -> FolderEvents:
    return FolderEvents([".nii.gz", ".nrrd"], lambda: calls.put("look"), lambda: calls.put("follow"))


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (FileCreatedEvent("/studies/a.nii.gz"), ["look"]),
        (FileModifiedEvent("/studies/A.NII.GZ"), ["look"]),
        (FileMovedEvent("/studies/a.nii.gz", "/studies/b.nii.gz"), ["look"]),
        (FileMovedEvent("/studies/upload.tmp", "/studies/a.nrrd"), ["look"]),
        (FileMovedEvent("/studies/labels/final/.7-ab.part", "/studies/labels/final/a.nii.gz"), ["follow"]),
        (FileCreatedEvent("/studies/datastore_v2.json"), []),
        (FileCreatedEvent("/studies/labels/final/.7-ab.part"), []),
    ],
    ids=repr,
)
def test_event_is_passed_on_by_what_it_means(
    event: FileSystemEvent, expected: list[str], handler: FolderEvents, calls: queue.Queue[str]
) -> None:
    handler.dispatch(event)
    assert list(calls.queue) == expected


@pytest.fixture
def studies(tmp_path: Path, handler: FolderEvents) -> Iterator[Path]:
    """A folder that is listened to, first to everything in it, as MONAI Label does."""
    for name in ("labels/final", "history"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a.nii.gz").write_bytes(b"image")
    observer = Observer()
    observer.schedule(handler, str(tmp_path), recursive=True)
    observer.start()
    listen(observer, handler, str(tmp_path), str(tmp_path / "labels"))
    yield tmp_path
    observer.stop()
    observer.join()


def test_files_that_come_are_heard_of_and_files_that_are_read_are_not(studies: Path, calls: queue.Queue[str]) -> None:
    for _ in range(20):
        (studies / "a.nii.gz").read_bytes()
    (studies / "history" / "a.nii.gz").write_bytes(b"a version")
    (studies / "labels" / "final" / ".7-ab.part").write_bytes(b"label")
    os.replace(studies / "labels" / "final" / ".7-ab.part", studies / "labels" / "final" / "a.nii.gz")
    assert calls.get(timeout=SECONDS) == "follow", "neither reading nor the history was heard of before"
    (studies / "upload.tmp").write_bytes(b"image")
    os.replace(studies / "upload.tmp", studies / "b.nii.gz")
    assert calls.get(timeout=SECONDS) == "look"
