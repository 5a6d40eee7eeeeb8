"""Reads DICOM files defensively: with or without the preamble of PS3.10, damaged, or still being copied."""

from __future__ import annotations

import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import _read_file_meta_info, read_preamble
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
)

from lib.errors import ImageError, UnetrError

MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
"""SOP Class UID of a DICOMDIR, which lists other files and is not an instance of a series."""
MOST_UNPACKED = 512 * 2**20
"""Largest size of a deflated data set after decompression; a megabyte may expand to a gigabyte."""
MOST_LEVELS = 32
"""Largest nesting depth of sequences. pydicom's cost of writing them grows exponentially: 300 levels exhaust the
memory.
"""
FIRST_GROUPS = (0x0002, 0x0008)
LARGEST_FIRST_ELEMENT = 0x0100
LONGEST_FIRST_VALUE = 1 << 16
BLOCK_BYTES = 2**20


def is_uid(text: str) -> bool:
    """Whether a text can be a UID and a file name: digits and dots, no leading dot, at most 64 characters.

    PS3.5, 9.1 has further rules, which not every archive follows.
    """
    return re.fullmatch(r"[0-9][0-9.]{0,63}", text) is not None


@contextmanager
def reading(what: str, kind: type[UnetrError] = ImageError) -> Iterator[None]:
    """Convert any exception of pydicom and its decoders for a damaged file into an error of this project.

    Their interfaces do not define which exception a damaged file raises: ValueError, struct.error, zlib.error,
    pydicom's BytesLengthException and Pillow's DecompressionBombError have occurred.

    Args:
        what: begin of the sentence: the file or instance, and what failed.
        kind: class of the error.
    """
    try:
        yield
    except UnetrError:
        raise
    except Exception as error:
        raise kind(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The message of a decoder's error, in one line and without the server's paths."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join("..." if word.startswith(("/", "'/")) else word for word in lines[-1].split())[:200]


def is_dicom(path: Path) -> bool:
    """Whether a regular file begins as defined in PS3.10, or like a data set without preamble."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return has_preamble(start) or _begins_as_data_set(start)


def has_preamble(start: bytes) -> bool:
    """Whether the first 132 bytes are those of a DICOM file of PS3.10."""
    return start[128:132] == b"DICM"


def _begins_as_data_set(start: bytes) -> bool:
    """Whether the data begin with an element of group 0002 or 0008, in one of the three native encodings."""
    for order in ("little", "big"):
        group, number = int.from_bytes(start[:2], order), int.from_bytes(start[2:4], order)
        if len(start) < 16 or group not in FIRST_GROUPS or number > LARGEST_FIRST_ELEMENT:
            continue
        is_explicit = start[4:6].isalpha() and start[4:6].isupper()
        length = int.from_bytes(start[4:8], "little")
        if is_explicit or (order == "little" and length < LONGEST_FIRST_VALUE):
            return True
    return False


def find_dicom(folder: Path) -> list[Path]:
    """The DICOM files in a folder (without subfolders), whatever their names."""
    return [path for path in sorted(folder.iterdir()) if is_dicom(path)]


def read_instance(file: Path | BinaryIO, with_pixels: bool = True) -> FileDataset:
    """Read a file with or without preamble; a missing transfer syntax is set to the one with which it was read.

    Raises:
        ImageError: if it is not a DICOM instance.
        Exception: any type that pydicom raises for a damaged file; see :func:`reading`.
    """
    _check_unpacked_size(file)
    instance = dcmread(file, force=True, stop_before_pixels=not with_pixels)
    if "SOPInstanceUID" not in instance and "SOPClassUID" not in instance and "Rows" not in instance:
        media_class = str(instance.file_meta.get("MediaStorageSOPClassUID", ""))
        if media_class != MEDIA_DIRECTORY:
            raise ImageError("it holds no DICOM instance")
    if not instance.file_meta.get("TransferSyntaxUID"):
        native = ImplicitVRLittleEndian if instance.is_implicit_VR else ExplicitVRLittleEndian
        instance.file_meta.TransferSyntaxUID = native if instance.is_little_endian else ExplicitVRBigEndian
    return instance


def check_levels(instance: Dataset) -> None:
    """Refuse sequences that are nested too deeply; all values are decoded.

    Raises:
        ImageError: naming the limit.
        Exception: any type that pydicom raises for a damaged value; see :func:`reading`.
    """
    level: list[Dataset] = [instance]
    for _ in range(MOST_LEVELS + 1):
        elements = [element for dataset in level for element in dataset]
        level = [item for element in elements if element.VR == "SQ" for item in element.value]
        if not level:
            return
    raise ImageError(f"its sequences are nested more than {MOST_LEVELS} levels deep")


def _check_unpacked_size(file: Path | BinaryIO) -> None:
    """Refuse a deflated data set whose decompression, which pydicom does at once, would take too much memory.

    Raises:
        ImageError: naming the limit.
    """
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        start = opened.tell()
        try:
            if not has_preamble(
                opened.read(132)
            ):  # a deflated data set requires file meta information, and so a preamble
                return
            opened.seek(start)
            read_preamble(opened, force=True)
            if str(_read_file_meta_info(opened).get("TransferSyntaxUID", "")) != DeflatedExplicitVRLittleEndian:
                return
            unpacking, left = zlib.decompressobj(-zlib.MAX_WBITS), MOST_UNPACKED
            while (block := unpacking.unconsumed_tail or opened.read(BLOCK_BYTES)) and not unpacking.eof:
                left -= len(unpacking.decompress(block, BLOCK_BYTES))
                if left < 0:
                    raise ImageError(f"its data set unpacks to more than {MOST_UNPACKED // 2**20} MiB, the most here")
        finally:
            opened.seek(start)
