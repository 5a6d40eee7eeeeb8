"""Labels that somebody puts into labels/final are right, or left out and told, and their cases stay open."""

from __future__ import annotations

import gzip
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from lib.datastore.label_files.found_labels import find_problems, label_files, label_id
from lib.datastore.label_files.segment_header import Segment
from lib.datastore.store import VersionedDatastore
from tests.segment_files import AFFINE, write_segments
from tests.tiny import boxes, tiny_preset, write_nifti

PRESET = tiny_preset()  # Left Box 1, core 2
IMAGE, LABEL = boxes()
THREE = [{"index": index, "name": f"nucleus {index}"} for index in (1, 2, 3)]
Open = Callable[..., VersionedDatastore]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        write_nifti(tmp_path / "studies" / f"{name}.nii.gz", IMAGE, AFFINE)
    (tmp_path / "studies" / "labels" / "final").mkdir(parents=True)
    return tmp_path / "studies"


@pytest.fixture
def reopen(studies: Path) -> Iterator[Open]:
    """Opens the store anew, as after a restart."""
    opened: list[VersionedDatastore] = []

    def open_again(*presets: object) -> VersionedDatastore:
        for store in opened:
            store.close()
        known = presets or (PRESET,)
        opened[:] = [VersionedDatastore(str(studies), presets=known, extensions=["*.nii.gz", "*.nii", "*.nrrd"])]
        return opened[0]

    yield open_again
    for store in opened:
        store.close()


def put(studies: Path, name: str, voxels: np.ndarray = LABEL) -> Path:
    """Put a label there by hand; long enough ago to have settled."""
    lower = studies / "labels" / "final" / f".{name.lower()}"
    file = write_nifti(lower, voxels, AFFINE).rename(studies / "labels" / "final" / name)
    os.utime(file, (1e9, 1e9))
    return file


def published(studies: Path, image: str = "one") -> nib.Nifti1Image:
    return nib.load(studies / "labels" / "final" / f"{image}.nii.gz")


@pytest.mark.parametrize("name", ["one.nii.gz", "one.NII.GZ", "one.nii", "one.Nii"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float64, np.int64])
def test_label_put_there_by_hand_is_kept_as_submitted_ones_are(
    studies: Path, reopen: Open, name: str, dtype: type
) -> None:
    content = studies / "labels" / "any.nii"
    nib.save(nib.Nifti1Image(LABEL.astype(dtype)[..., None], AFFINE, dtype=dtype), content)
    if name.lower().endswith(".gz"):
        content.write_bytes(gzip.compress(content.read_bytes(), mtime=0))
    sent = content.read_bytes()
    content.rename(studies / "labels" / "final" / name)
    store = reopen()
    assert store.get_labeled_images() == ["one"] and store.label_problems() == []
    assert published(studies).get_data_dtype() == np.uint8 and published(studies).shape == LABEL.shape
    np.testing.assert_array_equal(np.asarray(published(studies).dataobj), LABEL)
    version = store.history.latest("one")
    assert version is not None and store.history.sent(version).read_bytes() == sent
    assert [path.name for path in (studies / "labels" / "final").iterdir()] == ["one.nii.gz"]
    assert len(reopen().history.versions("one")) == 1


def test_segmentation_file_put_there_counts_by_the_names_in_its_header(studies: Path, reopen: Open) -> None:
    swapped = np.array([0, 2, 1], np.uint8)[LABEL]
    target = studies / "labels" / "final" / "one.seg.nrrd"
    write_segments(target, [swapped], (Segment("core", 1), Segment("Left Box", 2)))
    store = reopen()
    assert store.get_labeled_images() == ["one"]
    np.testing.assert_array_equal(np.asarray(published(studies).dataobj), LABEL)
    info = store.get_label_info("one", "final")
    assert (info["preset"], info["label_map"]) == ("tiny", {"Left Box": 1, "core": 2})
    assert not target.exists()


def halves() -> np.ndarray:
    return LABEL / 2


WRONG = {
    "shape": (LABEL[:-1], "shape"),
    "halves": (halves(), "no whole numbers, such as 0.5"),
    "unknown values": (LABEL * 3, "the values 3, 6"),
    "NaN": (np.where(LABEL > 0, np.nan, 0), "not finite"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("running", [False, True])
def test_wrong_label_is_told_and_its_case_stays_open(studies: Path, reopen: Open, kind: str, running: bool) -> None:
    voxels, sentence = WRONG[kind]
    store = reopen() if running else None
    bad = put(studies, "one.nii.gz", voxels)
    put(studies, "two.nii.gz")
    content = bad.read_bytes()
    store = store or reopen()
    for _ in range(2):
        store.refresh()
        assert store.get_labeled_images() == ["two"] and store.get_unlabeled_images() == ["one"]
        told = store.status()["label_problems"]
        assert [problem["file"] for problem in told] == ["labels/final/one.nii.gz"]
        assert sentence in told[0]["reason"]
        assert bad.read_bytes() == content
        kept = store.history.quarantine.all()
        assert [one.file.read_bytes() for one in kept] == [content], "once, however often it is looked at"
        store = reopen()
    put(studies, "one.nii.gz")
    os.utime(bad, (1.1e9, 1.1e9))
    store.refresh()
    assert store.label_problems() == [] and store.get_unlabeled_images() == []


def test_wrong_label_in_the_place_of_a_good_one_does_not_stay_there(studies: Path, reopen: Open) -> None:
    file = put(studies, "one.nii.gz")
    good = file.read_bytes()
    store = reopen()
    put(studies, "one.nii.gz", LABEL[:-1])
    store.refresh()
    assert file.read_bytes() == good and store.get_labeled_images() == ["one"]
    assert "shape" in store.history.quarantine.all()[0].reason
    put(studies, "one.nii.gz", np.where(LABEL == 2, 2, 0).astype(np.uint8))
    store = reopen()
    assert len(store.history.versions("one")) == 2, "a good one is a new version"


def test_of_two_labels_of_one_image_the_newer_counts(studies: Path, reopen: Open) -> None:
    older = put(studies, "one.nii.gz", np.where(LABEL == 2, 2, 0).astype(np.uint8))
    content = older.read_bytes()
    newer = put(studies, "one.nii")
    os.utime(newer, (1.1e9, 1.1e9))
    store = reopen()
    np.testing.assert_array_equal(np.asarray(published(studies).dataobj), LABEL)
    assert [one.file.read_bytes() for one in store.history.quarantine.all()] == [content]
    assert len(store.history.versions("one")) == 1


def test_other_tasks_labels_are_right_for_their_task(studies: Path, reopen: Open) -> None:
    other = tiny_preset(name="other", labels=THREE)
    put(studies, "one.nii.gz", (LABEL > 0) * np.uint8(3))
    assert reopen(PRESET, other).get_labeled_images() == ["one"]
    bad = put(studies, "two.nii.gz", LABEL * np.uint8(4))
    reason = reopen(PRESET, other).label_problems()[0].reason
    assert reason.startswith("as tiny: the mask has the values 4, 8") and "; as other: " in reason
    assert bad.exists()


def test_refused_label_is_looked_at_again_for_other_tasks(studies: Path, reopen: Open) -> None:
    put(studies, "one.nii.gz", (LABEL > 0) * np.uint8(3))
    assert reopen().get_labeled_images() == []
    assert reopen(tiny_preset(labels=THREE)).get_labeled_images() == ["one"]


def test_what_is_no_label_is_told(studies: Path, reopen: Open, tmp_path: Path) -> None:
    put(studies, "nobody.nii.gz")
    (studies / "labels" / "final" / "notes.txt").write_text("mine")
    put(studies, "one.nii.gz", LABEL[:-1])
    told = {problem.file.split("/")[-1]: problem.reason for problem in reopen().label_problems()}
    assert told["nobody.nii.gz"] == "there is no image 'nobody'"
    assert told["notes.txt"].startswith("it is of a kind that labels do not have") and "shape" in told["one.nii.gz"]
    shutil.rmtree(studies / "history")
    before = sorted(path.name for path in studies.rglob("*"))
    assert {p.file.split("/")[-1]: p.reason for p in find_problems(studies, [PRESET], tmp_path)} == told
    assert sorted(path.name for path in studies.rglob("*")) == before, "doctor changes nothing"


def test_content_of_another_kind_is_told_as_such(studies: Path, reopen: Open) -> None:
    (studies / "labels" / "final" / "one.nrrd").write_bytes(b"II*\0" + bytes(1000))  # TIFF
    told = reopen().label_problems()
    assert [problem.file for problem in told] == ["labels/final/one.nrrd"]
    assert told[0].reason.startswith("the label cannot be read")


def test_label_id_takes_the_longest_suffix() -> None:
    assert [label_id(name) for name in ("a.seg.nrrd", "a.b.NRRD", ".nii.gz", "a.nii.gz.txt")] == [
        "a",
        "a.b",
        None,
        None,
    ]


def test_labels_that_come_and_go_while_they_are_listed_are_left_out(tmp_path: Path) -> None:
    """Each page lists them; one that was removed between its name and its time made it answer 500."""
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            for number in range(20):
                (tmp_path / f"{number}.nii.gz").write_bytes(b"label")
            for number in range(20):
                (tmp_path / f"{number}.nii.gz").unlink()

    writing = threading.Thread(target=come_and_go)
    writing.start()
    try:
        for _ in range(2000):
            assert all(path.suffix == ".gz" for path in label_files(tmp_path))
    finally:
        ended.set()
        writing.join()
