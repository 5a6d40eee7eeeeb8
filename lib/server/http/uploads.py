"""Files that clients send: into a temporary folder that is always removed, and refused before they do harm.

A few kilobytes can unpack to gigabytes, and an NRRD or MetaImage header can name any file on the server as its data.
Both are looked for in the header, before anything reads the voxels.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import nibabel as nib
from fastapi import UploadFile
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from lib.errors import ImageError, InputError
from lib.server.http.errors import TooLargeError
from lib.server.http.names import safe_file_name

MIB = 2**20
BYTES_A_VOXEL = 4  # everything is computed in float32
HEADER_BYTES = 64 * 1024
MOST_FILES = 20_000
NIFTI_SUFFIXES = (".nii.gz", ".nii")
# Headers whose voxels lie in another file can only name one on the server.
DETACHED_SUFFIXES = (".nhdr", ".mhd", ".hdr", ".img")
_OTHER_FILE = re.compile(rb"^\s*(data ?file|elementdatafile)\s*[:=]", re.IGNORECASE | re.MULTILINE)
# An NRRD header ends with an empty line, a MetaImage header with the line that says that the voxels follow.
_HEADER_END = re.compile(rb"\r?\n\r?\n|ElementDataFile\s*=\s*LOCAL", re.IGNORECASE)
_SIZES = re.compile(rb"^\s*(?:sizes|dimsize)\s*[:=]\s*([\d ]+?)\s*$", re.IGNORECASE | re.MULTILINE)


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed whatever happens."""
    with tempfile.TemporaryDirectory(prefix="unetr-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def receive(upload: UploadFile, folder: Path, otherwise: str = "image.nii.gz") -> Path:
    """Copy an upload into ``folder`` under a harmless form of its name."""
    path = folder / safe_file_name(upload.filename, otherwise)
    upload.file.seek(0)
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file, MIB)
    return path


def check_header(path: Path, unpacked_limit_mib: int) -> None:
    """Refuse a file whose header asks for too much, or for another file.

    What a reader cannot make sense of at all is left to it: it says so better.

    Raises:
        ImageError: when the header leads to another file.
        TooLargeError: when the voxels take more than the limit.
    """
    name = path.name.lower()
    if name.endswith(DETACHED_SUFFIXES):
        raise ImageError(f"{path.name!r} has its voxels in another file; valid: one file that holds both")
    if name.endswith(NIFTI_SUFFIXES):
        voxels = _nifti_voxels(path)
    elif name.endswith((".nrrd", ".mha")):
        voxels = _text_header_voxels(path)
    else:
        return
    check_unpacked_size(voxels * BYTES_A_VOXEL, unpacked_limit_mib, path.name)


def check_unpacked_size(size_bytes: int, limit_mib: int, name: str) -> None:
    """Refuse what is too large once it is unpacked.

    Raises:
        TooLargeError: naming both sizes.
    """
    if size_bytes > limit_mib * MIB:
        raise TooLargeError(
            f"{name!r} is {math.ceil(size_bytes / MIB)} MiB once it is unpacked; valid: at most {limit_mib} MiB"
        )


def unpack(archive: Path, folder: Path, unpacked_limit_mib: int) -> None:
    """Unpack the files of a ZIP archive into ``folder``, side by side under numbers, as a DICOM series needs no names.

    Raises:
        InputError: when it is not a ZIP archive, is damaged, or holds too many files.
        TooLargeError: as soon as more than the limit has come out, whatever its directory says.
    """
    left = unpacked_limit_mib * MIB
    try:
        with zipfile.ZipFile(archive) as zipped:
            entries = [entry for entry in zipped.infolist() if not entry.is_dir()]
            if len(entries) > MOST_FILES:
                raise InputError(f"{archive.name!r} holds {len(entries)} files; valid: at most {MOST_FILES}")
            for number, entry in enumerate(entries):
                target = folder / f"{number:05d}-{safe_file_name(entry.filename, 'file')}"
                with zipped.open(entry) as source:
                    left -= _copy_at_most(source, target, left, archive.name, unpacked_limit_mib)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise InputError(f"{archive.name!r} is not a ZIP archive that can be read: {error}") from error


def _copy_at_most(source: IO[bytes], target: Path, most: int, name: str, limit_mib: int) -> int:
    copied = 0
    with target.open("wb") as file:
        while block := source.read(MIB):
            copied += len(block)
            if copied > most:
                raise TooLargeError(f"{name!r} unpacks to more than {limit_mib} MiB; valid: at most that")
            file.write(block)
    return copied


def _nifti_voxels(path: Path) -> int:
    try:
        return math.prod(max(1, int(size)) for size in nib.load(path).shape)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError, TypeError):
        return 0  # the reader's to explain


def _text_header_voxels(path: Path) -> int:
    with path.open("rb") as file:
        header, *rest = _HEADER_END.split(file.read(HEADER_BYTES), maxsplit=1)
    if _OTHER_FILE.search(header):
        raise ImageError(f"{path.name!r} has its voxels in another file; valid: one file that holds both")
    if not rest:
        raise ImageError(f"{path.name!r} is damaged: its header does not end within {HEADER_BYTES // 1024} KiB")
    sizes = _SIZES.search(header)
    return math.prod(int(size) for size in sizes[1].split()[:16]) if sizes else 0
