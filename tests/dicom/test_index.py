"""The index: what it holds after files came, changed and went, and after its own file was damaged."""

from __future__ import annotations

import io
import os
import shutil
import sqlite3
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lib.dicom.index import DicomIndex
from lib.dicom.presented.regular import Regular
from lib.dicom.query import search
from lib.dicom.resources import parse_accept, parse_path
from lib.dicom.retrieve import instance_parts
from lib.dicom.series import read_series
from lib.errors import NotFoundError
from tests.dicom.conftest import edit, strip_preamble

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


def test_change_by_another_process_is_seen(index: DicomIndex, tmp_path: Path, make_series: Make) -> None:
    """A training reads the same index: what it has removed from it, the server's own scan does not find changed."""
    seconds = 0.0
    database = tmp_path / ".dicom" / "index.sqlite"
    server = DicomIndex(tmp_path, database, ("labels",), clock=lambda: seconds)
    (uid,) = server.series()
    regular = tmp_path / "two" / "scout.dcm"
    files = make_series("coronal", "MR", "two")
    shutil.copy(files[0], regular)
    edit(regular, SOPInstanceUID="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    index.scan()
    seconds = 1.0
    added = (set(server.series()) - {uid}).pop()
    assert server.regular() == {added: Regular(len(files), "1 left out")}
    shutil.rmtree(tmp_path / "one")
    regular.unlink()
    index.scan()
    seconds = 2.0
    server.scan()
    assert [entry.series for entry in server.entries()] == [added] == list(server.series())
    assert server.regular() == {}


def test_own_change_is_seen_at_once(index: DicomIndex, make_series: Make) -> None:
    frozen = DicomIndex(index.folder, index.folder / ".dicom" / "index.sqlite", clock=lambda: 0.0)
    assert len(frozen.entries()) == 1
    for file in make_series("coronal", "MR", "two"):
        frozen.add(file)
    assert [entry.modality for entry in frozen.entries()] == ["CT", "MR"]


def test_query_while_a_series_is_removed_is_answered_from_the_list(index: DicomIndex, tmp_path: Path) -> None:
    server = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite", clock=lambda: 0.0)
    (entry,) = server.entries()
    shutil.rmtree(tmp_path / "one")
    index.scan()
    with pytest.raises(NotFoundError, match=entry.series):
        server.first(entry.study, entry.series)
    (shown,) = search(server, parse_path("series"), [("includefield", "EchoTime")], "http://here")
    assert shown["0020000E"]["Value"] == [entry.series]


def test_index_that_did_not_count_its_changes_is_kept(index: DicomIndex, tmp_path: Path) -> None:
    database = tmp_path / ".dicom" / "index.sqlite"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executescript("DROP TABLE changes; PRAGMA user_version = 4")
    again = DicomIndex(tmp_path, database)
    assert [entry.series for entry in again.entries()] == [entry.series for entry in index.entries()]
    shutil.rmtree(tmp_path / "one")
    again.scan()
    assert again.entries() == []


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


def test_next_start_reads_no_file_again(index: DicomIndex, tmp_path: Path) -> None:
    """Files of the same size and time whose content is gone: whoever read them would find problems."""
    files = sorted(tmp_path.rglob("*.dcm"))
    for file in files:
        status = file.stat()
        file.write_bytes(b"\0" * status.st_size)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite")
    again.scan()
    assert len(again.instances()) == len(files) == 11
    assert again.progress.problems == {}
    assert again.progress.indexed == again.progress.files == 11


def test_many_threads_read_while_one_writes(index: DicomIndex, tmp_path: Path) -> None:
    file = tmp_path / "one" / "0001.dcm"

    def read(_: int) -> int:
        return min(len(index.instances()) + len(index.metadata()) for _ in range(30))

    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(read, range(8))
        for _ in range(30):
            index.add(file)
        assert set(counts) == {22}


def odd_length(content: bytes) -> bytes:
    """Rows with three bytes, which no number of 16 bits has."""
    at = content.index(b"\x28\x00\x10\x00US\x02\x00")
    return content[: at + 6] + b"\x03\x00\x01\x02\x03" + content[at + 10 :]


def half_deflated(content: bytes) -> bytes:
    """A deflated file that is still being copied."""
    dataset = dcmread(io.BytesIO(content))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()[:-40]


def path_as_uid(content: bytes) -> bytes:
    dataset = dcmread(io.BytesIO(content))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.SeriesInstanceUID = "../../../up"
        dataset.save_as(buffer)
    return buffer.getvalue()


def endless_sequence(content: bytes) -> bytes:
    """A sequence of undefined length that never ends, of a vendor."""
    at = content.index(b"\x28\x00\x10\x00US")
    return content[:at] + b"\x27\x00\x10\x10SQ\x00\x00\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" * 3000


@pytest.mark.parametrize("damage", [odd_length, half_deflated, path_as_uid, endless_sequence, lambda c: b"\0" * 600])
def test_damaged_file_is_a_problem_with_its_path_and_the_rest_is_indexed(
    index: DicomIndex, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    bad = tmp_path / "one" / "bad.dcm"
    bad.write_bytes(damage((tmp_path / "one" / "0001.dcm").read_bytes()))
    edit(tmp_path / "one" / "0002.dcm", SeriesDescription="changed")
    index.scan()
    assert list(index.progress.problems) == ["one/bad.dcm"]
    assert index.progress.indexed == index.progress.files == 12
    assert len(index.instances()) == 11
    bad.unlink()
    index.scan()
    assert index.progress.problems == {}


def test_pipe_and_name_that_is_not_utf8_do_not_stop_the_index(index: DicomIndex, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with open(os.fsencode(tmp_path) + b"/M\xfcller.dcm", "wb") as file:
        file.write((tmp_path / "one" / "0001.dcm").read_bytes())
    index.scan()
    assert len(index.instances()) == 11
    assert index.progress.problems == {"M\\udcfcller.dcm": "its name is not UTF-8, so that nobody can ask for it"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_goes_on_after_a_scan_that_failed_and_says_when_it_is_gone(tmp_path: Path, make_series: Make) -> None:
    class Failing(DicomIndex):
        def scan(self) -> None:
            self.progress.scans += 1
            if self.progress.scans == 1:
                raise RuntimeError("the share is away")
            if self.progress.scans == 3:
                raise SystemExit  # nothing that a scan may raise: the thread ends

    made = Failing(tmp_path, tmp_path / ".dicom" / "index.sqlite")
    failures = []
    made._stopped.wait = lambda seconds: failures.append(made.failure()) or False  # type: ignore[assignment,func-returns-value]
    made.start()
    assert made._thread is not None
    made._thread.join(30)
    assert failures == ["the DICOM files cannot be indexed: the share is away", ""]
    assert made.failure() == "the index of the DICOM files is no longer kept up to date: its thread has ended"


def copy_series(files: list[Path], name: str, **changed: object) -> list[Path]:
    """A copy of a series with other attributes."""
    folder = files[0].parent.with_name(name)
    shutil.copytree(files[0].parent, folder)
    copies = sorted(folder.iterdir())
    for file in copies:
        edit(file, **changed)
    return copies


def test_series_of_one_uid_in_two_studies_are_told_under_two_uids(index: DicomIndex, tmp_path: Path) -> None:
    first = index.instances()[0]
    changed = {"StudyInstanceUID": "1.2.3", "PatientID": "OTHER"}
    copies = copy_series(sorted((tmp_path / "one").iterdir()), "another", **changed)
    index.scan()
    kept, named = index.entries()
    assert (kept.study, kept.series, kept.instances) == (first.study, first.series, 11)
    assert (named.study, named.instances) == ("1.2.3", 11)
    assert named.series.startswith("2.25.") and set(index.series()) == {first.series, named.series}
    assert index.name_in("1.2.3", first.series) == named.series
    assert index.name_in(first.study, first.series) == first.series
    assert not index.instances("1.2.3", first.series)
    assert {told["0020000E"]["Value"][0] for told in index.metadata("1.2.3")} == {named.series}
    (instance, *_) = index.instances("1.2.3")
    assert (instance.series, instance.is_renamed, instance.file.parent.name) == (named.series, True, "another")
    (part,) = instance_parts([instance], parse_accept("application/dicom; transfer-syntax=*"))
    sent = dcmread(io.BytesIO(part.content))
    assert (sent.SeriesInstanceUID, sent.StudyInstanceUID) == (named.series, "1.2.3")
    assert sent.PixelData == dcmread(instance.file).PixelData
    assert read_series(copies, uid=named.series).uid == named.series
    (path,) = index.progress.problems
    assert path == "another/0001.dcm"
    sentence = f"series {first.series} is that of study {first.study}, which was indexed first"
    assert sentence in index.progress.problems[path] and named.series in index.progress.problems[path]


@pytest.mark.parametrize("change", ["PRAGMA user_version = 1", "DROP TABLE claims; PRAGMA user_version = 2"])
def test_study_keeps_the_uid_of_its_series_when_the_index_is_made_anew(
    index: DicomIndex, tmp_path: Path, change: str
) -> None:
    """Its labels are kept under that UID: they must not become another study's, whose path goes first."""
    first, database = index.instances()[0], tmp_path / ".dicom" / "index.sqlite"
    copy_series(sorted((tmp_path / "one").iterdir()), "a-first", StudyInstanceUID="1.2.3")
    index.scan()
    names = {entry.study: entry.series for entry in index.entries()}
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.executescript(change)
    again = DicomIndex(tmp_path, database)
    again.scan()
    assert {entry.study: entry.series for entry in again.entries()} == names
    assert names[first.study] == first.series


def test_study_that_comes_after_another_is_gone_does_not_take_its_labels_over(
    index: DicomIndex, tmp_path: Path
) -> None:
    first = index.instances()[0]
    copy_series(sorted((tmp_path / "one").iterdir()), "another", StudyInstanceUID="1.2.3")
    shutil.rmtree(tmp_path / "one")
    index.scan()
    (entry,) = index.entries()
    assert entry.study == "1.2.3" and entry.series != first.series
    assert f"of study {first.study}, which was indexed first" in index.progress.problems["another/0001.dcm"]


def test_series_that_viewers_cannot_show_are_known_after_a_restart_and_a_change(
    index: DicomIndex, tmp_path: Path
) -> None:
    (series,) = index.series()
    assert index.regular() == {}
    scout = tmp_path / "one" / "scout.dcm"
    shutil.copy(tmp_path / "one" / "0001.dcm", scout)
    edit(scout, SOPInstanceUID="1.2.3", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    index.scan()
    expected = {series: Regular(11, "1 left out")}
    assert index.regular() == expected
    assert DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite").regular() == expected
    scout.unlink()
    index.scan()
    assert index.regular() == {}


def test_second_series_with_the_same_instance_uids_removes_nothing(index: DicomIndex, tmp_path: Path) -> None:
    first = index.instances()[0]
    copy_series(sorted((tmp_path / "one").iterdir()), "another", SeriesInstanceUID="1.2.3")
    index.scan()
    assert [(entry.series, entry.instances) for entry in index.entries()] == [(first.series, 11), ("1.2.3", 11)]
    again = index.instance(first.sop, first.study, "1.2.3")
    assert again is not None
    assert again.file.parent.name == "another"
    assert index.progress.problems == {}


def test_series_in_two_folders_is_one_and_copies_count_once(index: DicomIndex, tmp_path: Path) -> None:
    moved = sorted((tmp_path / "one").iterdir())[5:]
    (tmp_path / "two").mkdir()
    for file in moved:
        shutil.move(file, tmp_path / "two" / file.name)
    shutil.copy(tmp_path / "one" / "0001.dcm", tmp_path / "two" / "copy.dcm")
    index.scan()
    (entry,) = index.entries()
    assert entry.instances == 11
    assert index.progress.problems == {}


def test_instance_with_the_uid_of_another_one_is_a_problem(index: DicomIndex, tmp_path: Path) -> None:
    uid = str(dcmread(tmp_path / "one" / "0001.dcm").SOPInstanceUID)
    edit(tmp_path / "one" / "0002.dcm", SOPInstanceUID=uid)
    index.scan()
    assert index.progress.problems == {
        "one/0002.dcm": f"left out: instance {uid} is in one/0001.dcm too, with other attributes"
    }
    assert len(index.instances()) == 10


def test_series_without_preambles_is_indexed_and_what_is_none_is_told(index: DicomIndex, tmp_path: Path) -> None:
    for file in sorted((tmp_path / "one").iterdir()):
        strip_preamble(file)
    (tmp_path / "text.IMA").write_text("no DICOM")
    (tmp_path / "notes").write_text("no DICOM")
    index.scan()
    assert len(index.instances()) == 11
    assert index.instances()[0].syntax == "1.2.840.10008.1.2.1"
    assert index.progress.problems == {"text.IMA": "is no DICOM file, though its name says so"}


def test_screenshot_does_not_say_what_its_series_is(index: DicomIndex, tmp_path: Path) -> None:
    shot = tmp_path / "one" / "0000.dcm"
    shutil.copy(tmp_path / "one" / "0001.dcm", shot)
    edit(shot, SOPInstanceUID="1.2.3", Modality="OT", InstanceNumber=0, SamplesPerPixel=3, ImagePositionPatient=None)
    index.scan()
    (entry,) = index.entries()
    assert (entry.modality, entry.instances) == ("CT", 12)


def test_index_of_an_older_version_is_made_anew(tmp_path: Path, make_series: Make) -> None:
    make_series("axial", "CT", "one")
    file = tmp_path / ".dicom" / "index.sqlite"
    file.parent.mkdir()
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("CREATE TABLE files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, sop TEXT, problem TEXT)")
        connection.execute("CREATE TABLE instances (sop TEXT PRIMARY KEY)")
    made = DicomIndex(tmp_path, file)
    made.scan()
    assert len(made.instances()) == 11
