"""The index: what it holds after files came, changed and went, and after its own file was damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydicom import dcmread

from lib.dicom.index import DicomIndex
from tests.dicom.conftest import edit

Make = Callable[..., list[Path]]


@pytest.fixture
def index(tmp_path: Path, make_series: Make) -> DicomIndex:
    make_series("axial", "CT", "one")
    made = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite", ("labels",))
    made.scan()
    return made


def test_new_changed_and_removed_files_are_seen(index: DicomIndex, tmp_path: Path, make_series: Make) -> None:
    assert [entry.instances for entry in index.series().values()] == [11]
    files = make_series("coronal", "MR", "two")
    index.scan()
    assert sorted(entry.modality for entry in index.series().values()) == ["CT", "MR"]
    uid = str(dcmread(files[0]).SeriesInstanceUID)
    before = index.stamp(uid)
    edit(files[0], SeriesDescription="changed")
    index.scan()
    assert index.stamp(uid) != before
    assert index.metadata(series=uid)[0]["0008103E"]["Value"] == ["changed"]
    shutil.rmtree(files[0].parent)
    index.scan()
    assert list(index.series()) == [str(dcmread(tmp_path / "one" / "0001.dcm").SeriesInstanceUID)]


def test_second_file_of_an_instance_takes_over_when_the_first_goes(index: DicomIndex, tmp_path: Path) -> None:
    first = tmp_path / "one" / "0001.dcm"
    copy = tmp_path / "copy.dcm"
    shutil.copy(first, copy)
    index.scan()
    (instance,) = [i for i in index.instances() if i.sop == str(dcmread(copy).SOPInstanceUID)]
    instance.file.unlink()
    index.scan()
    index.scan()
    left = index.instance(instance.sop)
    assert left is not None
    assert left.file == ({first, copy} - {instance.file}).pop()


def test_other_files_and_folders_are_passed_over(index: DicomIndex, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    shutil.copy(tmp_path / "one" / "0001.dcm", tmp_path / "labels" / "not-scanned.dcm")
    (tmp_path / "readme").write_text("no DICOM")
    (tmp_path / "broken.dcm").write_bytes((tmp_path / "one" / "0001.dcm").read_bytes()[:400])
    index.scan()
    assert len(index.instances()) == 11
    assert [Path(path).name for path in index.progress.problems] == ["broken.dcm"]


def test_damaged_index_is_made_anew(index: DicomIndex, tmp_path: Path) -> None:
    damaged = tmp_path / ".dicom" / "damaged.sqlite"
    damaged.write_bytes(b"this is no database" * 100)
    again = DicomIndex(tmp_path, damaged)
    again.scan()
    assert len(again.instances()) == 11


def test_next_start_reads_no_file_again(index: DicomIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    again = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite")
    monkeypatch.setattr("lib.dicom.index._read", lambda file: pytest.fail(f"{file} was read"))
    again.scan()
    assert len(again.instances()) == 11
    assert again.progress.indexed == again.progress.found == 11


def test_many_threads_read_while_one_writes(index: DicomIndex, tmp_path: Path) -> None:
    file = tmp_path / "one" / "0001.dcm"

    def read(_: int) -> int:
        return min(len(index.instances()) + len(index.metadata()) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(read, range(8))
        for _ in range(30):
            index.add(file)
        assert set(counts) == {22}
