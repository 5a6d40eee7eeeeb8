from __future__ import annotations

import asyncio
import gzip
import io
import zipfile
from pathlib import Path

import nibabel as nib
import nrrd
import numpy as np
import pytest
from fastapi import UploadFile

from lib.errors import ImageError, InputError
from lib.server.http.errors import TooLargeError
from lib.server.http.uploads import (
    check_header,
    receive,
    temporary_folder,
    temporary_folder_beside_loop,
    unpack,
)
from tests.tiny import boxes, write_nifti


def test_temporary_folder_is_gone_even_after_a_failure() -> None:
    with pytest.raises(ValueError, match="x"), temporary_folder() as folder:
        (folder / "file").write_bytes(b"1")
        raise ValueError("x")
    assert not folder.exists()


def test_temporary_folder_of_a_coroutine_is_gone_when_it_is_cancelled() -> None:
    made: list[Path] = []

    async def hold() -> None:
        async with temporary_folder_beside_loop() as folder:
            (folder / "file").write_bytes(b"1")
            made.append(folder)
            await asyncio.sleep(3600)

    async def main() -> None:
        holding = asyncio.create_task(hold())
        while not made:
            await asyncio.sleep(0.001)
        assert (made[0] / "file").is_file()
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding

    asyncio.run(main())
    assert not made[0].exists()


def test_upload_keeps_its_bytes_and_a_harmless_name(tmp_path: Path) -> None:
    upload = UploadFile(io.BytesIO(b"content"), filename="/home/anna/../scan 1.nii.gz")
    upload.file.read()
    path = receive(upload, tmp_path)
    assert path == tmp_path / "scan_1.nii.gz"
    assert path.read_bytes() == b"content"


def test_ordinary_files_pass(tmp_path: Path) -> None:
    nrrd.write(str(tmp_path / "a.nrrd"), np.zeros((4, 5, 6), np.uint8))
    check_header(tmp_path / "a.nrrd", 1)
    check_header(write_nifti(tmp_path / "a.nii.gz", boxes()[0]), 1)
    (tmp_path / "a.dcm").write_bytes(b"\0" * 200)
    check_header(tmp_path / "a.dcm", 1)


def test_size_is_that_of_the_voxels_in_float32(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "a.nii.gz", np.zeros((64, 64, 65), np.uint8))  # 65/64 of 1 MiB
    assert path.stat().st_size < 10_000
    with pytest.raises(TooLargeError, match=r"'a\.nii\.gz' is 2 MiB once it is unpacked; valid: at most 1 MiB"):
        check_header(path, 1)
    check_header(path, 2)


def test_header_that_promises_too_much_is_refused_without_unpacking(tmp_path: Path) -> None:
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(header.binaryblock + b"\0" * 4))
    with pytest.raises(TooLargeError, match="102996827 MiB"):
        check_header(path, 4096)


def test_nrrd_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.nrrd"
    path.write_bytes(b"NRRD0004\ntype: short\ndimension: 3\nsizes: 4096 4096 4096\nendian: little\nencoding: gzip\n\n")
    with pytest.raises(TooLargeError, match="262144 MiB"):
        check_header(path, 4096)


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.nrrd", b"NRRD0004\ntype: uchar\ndimension: 3\nsizes: 2 2 2\ndata file: /etc/passwd\nencoding: raw\n\n"),
        ("a.nrrd", b"NRRD0004\r\nsizes: 2 2 2\r\nDataFile: ../x\r\n\r\n"),
        ("a.nrrd", b"NRRD0004\nsizes: 2 2 2\n datafile : LIST\n/etc/passwd\n\n"),
        ("a.nhdr", b"NRRD0004\n"),
    ],
)
def test_header_that_leads_to_another_file_is_refused(tmp_path: Path, name: str, header: bytes) -> None:
    (tmp_path / name).write_bytes(header)
    with pytest.raises(ImageError, match="in another file"):
        check_header(tmp_path / name, 1)


def test_header_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nrrd"
    path.write_bytes(b"NRRD0004\n" + b"# padding\n" * 500_000 + b"data file: /etc/passwd\n\n")
    with pytest.raises(ImageError, match="does not end within 4 MiB"):
        check_header(path, 1)


def pack(folder: Path, files: dict[str, bytes]) -> Path:
    path = folder / "scan.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_archive_is_unpacked_flat(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    unpack(pack(tmp_path, {"a/1.dcm": b"one", "../../b.dcm": b"two", "/c.dcm": b"three"}), tmp_path / "out", 1)
    files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == {"00000-1.dcm": b"one", "00001-b.dcm": b"two", "00002-c.dcm": b"three"}


def test_archive_is_stopped_at_the_limit(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    bomb = pack(tmp_path, {"a": b"\0" * 2**19, "b": b"\0" * (50 * 2**20)})
    with pytest.raises(TooLargeError, match="more than 1 MiB"):
        unpack(bomb, tmp_path / "out", 1)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 2**20


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04garbage"])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scan.zip").write_bytes(content)
    with pytest.raises(InputError, match=r"'scan.zip' is not a ZIP archive"):
        unpack(tmp_path / "scan.zip", tmp_path, 1)
