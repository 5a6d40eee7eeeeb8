"""What lies in a studies folder is a case, or is told."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from lib.datastore.images.folder import list_images
from lib.datastore.store import VersionedDatastore
from tests.tiny import boxes, write_nifti

ENDINGS = (".nii.gz", ".nii", ".nrrd")
IRREGULAR = "is no regular file, though it is named as an image"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_nifti(tmp_path / "elsewhere" / "image.nii.gz", boxes()[0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    return folder


def _problems(folder: Path) -> dict[str, str]:
    return {problem.name: problem.reason for problem in list_images(folder, ENDINGS).problems}


def test_ending_in_capitals_and_a_doubled_one_are_images(folder: Path, image: Path) -> None:
    for name in ("X.NII.GZ", "b.nii.gz.nii.gz", "c.d.nii"):
        shutil.copy(image, folder / name)
    listing = list_images(folder, ENDINGS)
    assert listing.images == {"X": ".NII.GZ", "b.nii.gz": ".nii.gz", "c.d": ".nii"}
    assert listing.problems == ()


@pytest.mark.parametrize("names", [("a.nii.gz", "a.nrrd"), ("a.nrrd", "a.nii.gz")])
def test_of_two_files_with_one_id_the_order_of_arrival_does_not_choose(folder: Path, names: tuple[str, str]) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")
    assert list_images(folder, ENDINGS).images == {"a": ".nii.gz"}
    assert _problems(folder) == {"a.nrrd": "has the same id as 'a.nii.gz', which is the case; rename it"}


def test_what_is_no_case_is_told_with_the_reason(folder: Path, image: Path) -> None:
    for name in ("x.seg.nrrd", "scan.mha", ".hidden.nii.gz", "notes.txt", "labels/final/a.nii.gz", "sub/deep/y.nii.gz"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / name)
    (folder / "directory.nii.gz").mkdir()
    (folder / "loop.nii.gz").symlink_to("loop.nii.gz")
    (folder / "gone.nii.gz").symlink_to("nowhere.nii.gz")
    assert list_images(folder, ENDINGS).images == {}
    assert _problems(folder) == {
        **dict.fromkeys(("directory.nii.gz", "loop.nii.gz", "gone.nii.gz"), IRREGULAR),
        "scan.mha": "is of a kind that is not read from a folder; valid: .nii.gz, .nii, .nrrd",
        "x.seg.nrrd": "is a segmentation, not an image; a label belongs into labels/final, as x.nrrd",
        "sub/deep/": "an image lies in a sub-folder and cannot be seen, such as 'y.nii.gz'; move them up",
    }


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_name_that_is_no_utf8_is_told_in_letters_that_can_be_sent(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/M\xfcller.nii")).write_bytes(b"x")
    assert list_images(folder, ENDINGS).images == {}
    assert _problems(folder) == {"M\\udcfcller.nii": "its name is not UTF-8; rename it"}


def test_store_serves_those_images_and_tells_the_rest(folder: Path, image: Path) -> None:
    for name in ("X.NII.GZ", "b.nii.gz.nii.gz", "a.nrrd", "x.seg.nrrd"):
        shutil.copy(image, folder / name)
    store = VersionedDatastore(str(folder), extensions=["*.nii.gz", "*.nii", "*.nrrd"])
    try:
        assert sorted(store.list_images()) == ["X", "a", "b.nii.gz"]
        assert all(Path(store.get_image_uri(name)).is_file() for name in store.list_images())
        assert [problem.name for problem in store.problems] == ["x.seg.nrrd"]
        shutil.copy(image, folder / "a.nii.gz")
        store.refresh()
        assert Path(store.get_image_uri("a")).name == "a.nii.gz"
        assert sorted(problem.name for problem in store.problems) == ["a.nrrd", "x.seg.nrrd"]
    finally:
        store.close()
