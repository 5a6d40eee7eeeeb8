"""The parts of a STOW request are written to files while the body arrives."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydicom import dcmread
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import DeflatedExplicitVRLittleEndian

from lib.dicom.files import MOST_LEVELS, MOST_UNPACKED, is_uid, read_instance
from lib.dicom.index import DicomIndex
from lib.dicom.sources import SEGMENTATIONS, STORED, FolderSource
from lib.dicom.store import MOST_PARTS, PartWriter, read_part
from lib.errors import ParameterError, StorageError
from lib.storage.admission import Admission
from tests.dicom.conftest import edit

TYPE = 'multipart/related; type="application/dicom"; boundary=limit'
HEADER = b"--limit\r\nContent-Type: application/dicom\r\n\r\n"
CONTENTS = [b"first\r\n--limi", b"", b"\r\n\r\nthird\r\n--limX\r\n"]
BODY = b"".join(HEADER + content + b"\r\n" for content in CONTENTS) + b"--limit--\r\n"


def write(body: bytes, folder: Path, block: int = 7, content_type: str = TYPE) -> list[bytes]:
    writer = PartWriter(content_type, folder)
    try:
        for start in range(0, len(body), block):
            writer.write(body[start : start + block])
        return [file.read_bytes() for file in writer.finish()]
    finally:
        writer.abandon()


@pytest.mark.parametrize("block", [1, 2, 7, 50, 10_000])
def test_parts_are_the_same_however_the_body_is_cut(tmp_path: Path, block: int) -> None:
    assert write(BODY, tmp_path, block) == CONTENTS


@pytest.mark.parametrize("block", [1, 10_000])
def test_text_around_the_parts_and_parts_without_headers_are_taken(tmp_path: Path, block: int) -> None:
    body = b"preamble --limit\r\n--limit\r\n\r\nabc\r\n--limit--\r\nepilogue"
    assert write(body, tmp_path, block) == [b"abc"]


@pytest.mark.parametrize(
    "body",
    [b"", b"no parts", BODY[:-12], HEADER, HEADER + b"abc", b"--limit--\r\n", b"--limit" + b"x" * 100, b"x" * 200_000],
    ids=["empty", "no parts", "cut off", "header alone", "no end", "no part", "other boundary", "long preamble"],
)
def test_body_that_is_no_parts_is_refused(tmp_path: Path, body: bytes) -> None:
    with pytest.raises(ParameterError, match="closed by it"):
        write(body, tmp_path)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "application/json",
        "multipart/related",
        "multipart/related; boundary=",
        f"multipart/related; boundary={5000 * 'x'}",
    ],
)
def test_other_content_type_is_refused(tmp_path: Path, content_type: str) -> None:
    with pytest.raises(ParameterError, match="multipart/related"):
        PartWriter(content_type, tmp_path)


def test_too_many_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=f"more than {MOST_PARTS} parts"):
        write(b"--limit\r\n\r\n\r\n" * (MOST_PARTS + 1), tmp_path, 2**20)
    assert len(list(tmp_path.iterdir())) == MOST_PARTS


def test_part_that_does_not_begin_as_dicom_is_refused_with_its_size(tmp_path: Path) -> None:
    file = tmp_path / "x.dcm"
    file.write_bytes(b"\xff" * 5000)
    with pytest.raises(ParameterError, match=r"'5000 bytes'.*does not begin as DICOM"):
        read_part(file)


@pytest.mark.parametrize("uid", ["..", ".", "...", ".1", "../1", "1/2", "a", "1" * 65])
@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_uid_that_leads_elsewhere_is_refused(make_series: Callable[..., list[Path]], keyword: str, uid: str) -> None:
    """Two dots passed for digits and dots, and what was stored lay outside of the studies."""
    file = make_series()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit(file, **{keyword: uid})
        with pytest.raises(ParameterError, match="UIDs"):
            read_part(file)


@pytest.mark.parametrize("uid", ["1.2.840.10008", "2.25.0", "1.2.", "1..2", "1" * 64])
def test_uids_as_archives_write_them_are_taken(uid: str) -> None:
    assert is_uid(uid)


def test_deflated_data_set_that_unpacks_to_gigabytes_is_refused_before_it_is(
    make_series: Callable[..., list[Path]],
) -> None:
    """pydicom unpacks it as a whole: a file of a megabyte took a gigabyte of memory."""
    file = make_series()[0]
    instance = dcmread(file)
    instance.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    instance.save_as(file, write_like_original=False)
    assert read_instance(file).PixelData == instance.PixelData
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(1 + MOST_UNPACKED // 2**20)) + packer.flush()
    with file.open("rb") as opened:
        read_preamble(opened, force=False)
        _read_file_meta_info(opened)
        header = file.read_bytes()[: opened.tell()]
    file.write_bytes(header + packed)
    tracemalloc.start()
    with pytest.raises(ParameterError, match="unpacks to more than 512 MiB"):
        read_part(file)
    assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    tracemalloc.stop()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("levels", "fits"), [(MOST_LEVELS, True), (MOST_LEVELS + 1, False), (400, False), (5000, False)]
)
def test_sequences_that_are_nested_too_deeply_are_refused(
    make_series: Callable[..., list[Path]], tmp_path: Path, levels: int, fits: bool
) -> None:
    """To write 300 levels took all memory of the server."""
    file, nested = make_series()[0], b""
    for _ in range(levels):
        item = struct.pack("<HHI", 0xFFFE, 0xE000, len(nested)) + nested
        nested = struct.pack("<HH2sHI", 0x0008, 0x1115, b"SQ", 0, len(item)) + item
    with file.open("rb") as opened:
        read_preamble(opened, force=False)
        _read_file_meta_info(opened)
        start, content = opened.tell(), file.read_bytes()
    file.write_bytes(content[:start] + nested + content[start:])
    index = DicomIndex(tmp_path, tmp_path / ".dicom" / "index.sqlite")
    index.scan()
    assert [*index.progress.problems] == ([] if fits else [str(file.relative_to(tmp_path))])
    if fits:
        read_part(file)
        return
    with pytest.raises(ParameterError, match=f"nested more than {MOST_LEVELS} levels deep|recursion"):
        read_part(file)


@pytest.mark.skipif(os.name == "nt", reason="needs links of POSIX")
@pytest.mark.parametrize("deep", [False, True])
def test_instance_is_not_stored_behind_a_link(
    make_series: Callable[..., list[Path]], tmp_path: Path, deep: bool
) -> None:
    instance = read_instance(make_series()[0])
    (tmp_path / "outside").mkdir()
    studies = tmp_path / "studies"
    place = studies / STORED / (str(instance.StudyInstanceUID) if deep else "")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(tmp_path / "outside")
    (studies / SEGMENTATIONS).symlink_to(tmp_path / "outside")
    index = DicomIndex(studies, tmp_path / "index.sqlite")
    source = FolderSource(index, ["CT"])
    with pytest.raises(StorageError, match="is a link out of the studies folder"):
        source.keep_instance(instance)
    with pytest.raises(StorageError, match="is a link out of the studies folder"):
        source.keep_segmentation(instance, "1.2.3")
    assert not list((tmp_path / "outside").rglob("*"))
    FolderSource(index, ["CT"], Admission(studies, [tmp_path / "outside"])).keep_instance(instance)
    assert len(list((tmp_path / "outside").rglob("*.dcm"))) == 1
