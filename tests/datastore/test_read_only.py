"""A studies folder that cannot be written to is served as far as it can be."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib.datastore.records import Submission
from lib.datastore.series import can_write_below
from lib.datastore.store import VersionedDatastore
from lib.errors import StorageError
from lib.storage.admission import Admission
from tests.tiny import boxes, write_nifti


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """A folder in which neither the history nor the index has room: files lie where their folders would."""
    folder = tmp_path / "studies"
    write_nifti(folder / "a.nii.gz", boxes()[0])
    for name in ("history", ".dicom", "labels"):
        (folder / name).write_bytes(b"in the way")
    return folder


def test_images_are_served_and_labels_refused(studies: Path) -> None:
    store = VersionedDatastore(str(studies), extensions=["*.nii.gz"])
    try:
        assert store.history.read_only
        assert store.list_images() == store.get_unlabeled_images() == ["a"]
        store.update_image_info("a", {"strategy": "first"})
        assert store.leases.take("a", "anna") is not None
        with pytest.raises(StorageError, match="cannot be written to"):
            store.save_version(studies / "a.nii.gz", Submission(image_id="a", tag="final"))
    finally:
        store.close()


def test_index_finds_another_place(studies: Path, tmp_path: Path) -> None:
    assert not can_write_below(studies, Admission(studies))
    assert can_write_below(tmp_path, Admission(tmp_path))
