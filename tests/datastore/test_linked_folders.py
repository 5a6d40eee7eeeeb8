"""Folders of the label store that are links out of the studies: nothing is written, removed or read there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lib.datastore.records import Submission
from lib.datastore.series import can_write_below
from lib.datastore.store import VersionedDatastore
from lib.errors import NotFoundError, StorageError
from lib.storage.admission import Admission
from tests.tiny import boxes, tiny_preset, write_nifti

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
Open = Callable[..., VersionedDatastore]


def fingerprint(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the studies, with a label of somebody else's in it."""
    write_nifti(tmp_path / "outside" / "a.nii.gz", boxes()[1])
    return tmp_path / "outside"


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens the store anew, as after a restart."""
    opened: list[VersionedDatastore] = []
    for name in ("a", "b"):
        write_nifti(tmp_path / "studies" / f"{name}.nii.gz", boxes()[0])

    def open_again(**options: object) -> VersionedDatastore:
        for store in opened:
            store.close()
        opened[:] = [
            VersionedDatastore(str(tmp_path / "studies"), (tiny_preset(),), extensions=["*.nii.gz"], **options)
        ]
        return opened[0]

    yield open_again
    for store in opened:
        store.close()


def keep(store: VersionedDatastore, folder: Path) -> None:
    file = write_nifti(folder / "label.nii.gz", boxes()[1])
    store.save_version(file, Submission(image_id="b", tag="final", preset="tiny"))


@pytest.mark.parametrize(
    "place", ["labels", "labels/final", "history", "history/versions", "history/versions/00000", "history/sent"]
)
def test_label_is_not_written_through_a_link(reopen: Open, outside: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "studies" / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "studies" / place).symlink_to(outside)
    before = fingerprint(outside)
    store = reopen()
    with pytest.raises(StorageError, match=r"cannot be written to|is a link out of the studies folder"):
        keep(store, tmp_path)
    assert store.history.versions("a") == store.history.versions("b") == []
    assert store.label_problems() == [], "names of files that lie elsewhere are told"
    if place != "history/versions/00000":
        assert place in " ".join(store.folders_left_out())
    store.close()
    assert fingerprint(outside) == before and [path.name for path in outside.iterdir()] == ["a.nii.gz"]


def test_allowed_link_is_written_through(reopen: Open, outside: Path, tmp_path: Path) -> None:
    (tmp_path / "studies" / "labels").mkdir()
    (tmp_path / "studies" / "labels" / "final").symlink_to(outside)
    store = reopen(image_roots=[outside])
    keep(store, tmp_path)
    assert (outside / "b.nii.gz").is_file() and store.folders_left_out() == {}


def test_folder_that_becomes_a_link_is_not_emptied(reopen: Open, outside: Path, tmp_path: Path) -> None:
    store = reopen()
    keep(store, tmp_path)
    final = tmp_path / "studies" / "labels" / "final"
    final.rename(tmp_path / "moved")
    write_nifti(outside / "b.nii.gz", boxes()[1])
    before = fingerprint(outside)
    final.symlink_to(outside)
    for change in (lambda: store.remove_label("b", "final"), lambda: store.remove_image("b")):
        with pytest.raises(StorageError, match="is a link out of the studies folder"):
            change()
    reopen()
    assert fingerprint(outside) == before


def test_refused_label_and_prediction_are_not_kept_elsewhere(reopen: Open, outside: Path, tmp_path: Path) -> None:
    store = reopen()
    for name in ("quarantine", "predictions"):
        (store.history.folder / name).symlink_to(outside)
    before = fingerprint(outside)
    with pytest.raises(PermissionError):
        store.history.quarantine.keep(tmp_path / "studies" / "a.nii.gz", "wrong", {})
    assert store.history.quarantine.all() == [] and store.history.quarantine.count() == 0
    with pytest.raises(NotFoundError):
        store.history.quarantine.get("20260101-000000-000000-00000000")
    store.predictions.remember("anna", "a", "tiny", "v1", "a.nii.gz", b"mask")
    store.predictions.close()
    assert fingerprint(outside) == before


@pytest.mark.parametrize("place", [".dicom", ".dicom/volumes", ".dicom/channels"])
def test_converted_series_do_not_lie_behind_a_link(outside: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "studies" / ".dicom").parent.mkdir(exist_ok=True)
    (tmp_path / "studies" / place).parent.mkdir(exist_ok=True)
    (tmp_path / "studies" / place).symlink_to(outside)
    studies = tmp_path / "studies"
    assert not can_write_below(studies, Admission(studies))
    assert can_write_below(studies, Admission(studies, [outside]))


def test_removed_image_leaves_nothing_to_the_next_of_its_id(reopen: Open, tmp_path: Path) -> None:
    store = reopen()
    keep(store, tmp_path)
    store.update_image_info("b", {"patient": "Anna"})
    store.update_label_info("b", "final", {"patient": "Anna"})
    store.leases.skip("b", "anna", "blurred")
    store.effort.count_prompt("b", "anna")
    store.remove_image("b")
    assert store.effort.find("b", "anna").prompts == 0
    assert store.history.index.infos() == {} and store.leases.skipped() == {}
    write_nifti(tmp_path / "studies" / "b.nii.gz", boxes()[0])
    assert "patient" not in reopen().get_image_info("b")
