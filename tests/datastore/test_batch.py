"""A batch over a pool with files that cannot be segmented: each is a sentence, and the others are segmented."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monailabel.interfaces.datastore import Datastore

from lib.datastore.batch import DrawnLabelsStay
from lib.datastore.records import MadeMask
from lib.datastore.store import VersionedDatastore
from lib.errors import ImageError
from lib.imagefiles.reading import read_voxels
from tests.tiny import write_nifti

REQUEST = {"images": "all", "max_workers": 2, "multi_gpu": False, "device": "cpu"}


def read(request: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
    """Stands in for the network: reads what an inference would read."""
    read_voxels(Path(store.get_image_uri(request["image"])))
    return {"params": {"read": True}}


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[VersionedDatastore]:
    """Two good images among a FIFO, links to devices, and damaged files."""
    for name in ("a", "z"):
        write_nifti(tmp_path / f"{name}.nii.gz", np.ones((4, 4, 4), np.float32))
    good = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(good[:-9])
    (tmp_path / "empty.nii.gz").touch()
    (tmp_path / "junk.nii.gz").write_bytes(b"\x1f\x8bjunk")
    os.mkfifo(tmp_path / "fifo.nii.gz")
    (tmp_path / "device.nii.gz").symlink_to("/dev/zero")
    store = VersionedDatastore(str(tmp_path), extensions=["*.nii.gz"])
    yield store
    store.close()


def test_pool_with_foreign_and_damaged_files_comes_to_its_end(
    pool: VersionedDatastore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    named = ["a", "cut", "device", "fifo", "junk", "z"]
    result = DrawnLabelsStay(60)({**REQUEST, "images": named}, pool, read)
    assert list(result) == named
    assert [name for name, said in result.items() if "error" not in said] == ["a", "z"]
    assert "damaged" in result["cut"]["error"]
    assert not any(record.exc_info for record in caplog.records), "a sentence, no stack trace"
    told = [record.getMessage() for record in caplog.records if "was left out" in record.getMessage()]
    assert len(told) == 4 and not any("\n" in line for line in told)
    everything = DrawnLabelsStay(60)(REQUEST, pool, read)
    assert {"fifo", "device"}.isdisjoint(everything) and everything["a"] == {"params": {"read": True}}


def test_batch_of_which_nothing_can_be_segmented_fails_with_the_reason(pool: VersionedDatastore) -> None:
    with pytest.raises(ImageError, match=r"none of 1 images could be segmented; the first: image 'cut\.nii"):
        DrawnLabelsStay(60)({**REQUEST, "images": ["cut"]}, pool, read)


def test_image_that_takes_too_long_is_left_and_interrupted(pool: VersionedDatastore) -> None:
    checks: ContextVar[Callable[[], None]] = ContextVar("checks")
    interrupted = threading.Event()

    @contextmanager
    def interruptible(check: Callable[[], None]) -> Iterator[None]:
        token = checks.set(check)
        yield
        checks.reset(token)

    def infer(request: Mapping[str, Any], store: Datastore) -> dict[str, Any]:
        while request["image"] == "a":
            try:
                checks.get()()
            except ImageError:
                interrupted.set()
                raise
        return {"params": {}}

    batch = DrawnLabelsStay(0.1, interruptible)
    result = batch({**REQUEST, "images": ["a", "z"]}, pool, infer)
    assert result["a"] == {"error": "image 'a' took longer than 0.2 s, the most for one image of a batch"}
    assert result["z"] == {"params": {}}
    assert interrupted.wait(20)


def test_batch_that_goes_on_leaves_out_what_it_has_done(pool: VersionedDatastore) -> None:
    begun = "2000-01-01T00:00:00.000+00:00"
    pool.save_label("a", pool.get_image_uri("a"), "original", {"model": "tiny", "params": {}})
    batch = DrawnLabelsStay(60)
    for images in ("all", ["a", "z"]):
        request = {**REQUEST, "images": images, "label_tag": "original"}
        assert {"a", "z"} <= set(batch.get_images(request, pool)), "another batch's masks are made anew"
        assert "a" not in batch.get_images({**request, "begun_at": begun}, pool)
        assert "a" in batch.get_images({**request, "begun_at": "2999-01-01T00:00:00.000+00:00"}, pool)
    named = {**REQUEST, "images": ["a", "cut", "z"], "max_batch_size": 2, "begun_at": begun}
    assert batch.get_images(named, pool) == ["cut"], "one of two is done"


def test_masks_from_elsewhere_are_kept_here_and_what_has_none_is_a_sentence(
    pool: VersionedDatastore, tmp_path: Path
) -> None:
    asked: list[tuple[str, str, bool]] = []

    def elsewhere(model: str, images: Iterator[tuple[str, Path]]) -> Iterator[MadeMask]:
        for image, file in images:
            asked.append((model, image, file.is_file()))
            if image == "cut":
                yield MadeMask(image, problem="image 'cut' is damaged")
            else:
                yield MadeMask(image, file.read_bytes(), {"model": {"version": "v0007"}, "label_names": {"box": 1}})

    request = {**REQUEST, "images": ["a", "cut", "gone", "z"], "model": "tiny", "label_tag": "original"}
    result = DrawnLabelsStay(elsewhere=elsewhere)(request, pool, read)
    assert asked == [("tiny", "a", True), ("tiny", "cut", True), ("tiny", "z", True)]
    assert result["cut"] == {"error": "image 'cut' is damaged"} and "'gone'" in result["gone"]["error"]
    for image in ("a", "z"):
        (version,) = pool.history.versions(image, "original")
        assert (version.model_version, version.is_drawn, version.preset) == ("v0007", False, "tiny")
        assert dict(version.label_map) == {"box": 1}
