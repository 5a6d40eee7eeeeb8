"""DICOM files as they come: with the preamble of PS3.10 or without, damaged, or still being copied."""

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
"""SOP Class UID of a DICOMDIR, which lists other files and is no instance of a series."""
MOST_UNPACKED = 512 * 2**20
"""Most bytes of a deflated data set once it is unpacked; a megabyte can become a gigabyte."""
MOST_LEVELS = 32
"""Of sequences in sequences. What pydicom needs to write them grows exponentially: 300 levels take all memory."""
FIRST_GROUPS = (0x0002, 0x0008)
LARGEST_FIRST_ELEMENT = 0x0100
LONGEST_FIRST_VALUE = 1 << 16
BLOCK_BYTES = 2**20


def is_uid(text: str) -> bool:
    """Whether a text can be a UID, and the name of a file: digits and dots, no dot first, at most 64 letters.

    PS3.5, 9.1 asks for more, which not every archive keeps to.
    """
    return re.fullmatch(r"[0-9][0-9.]{0,63}", text) is not None


@contextmanager
def reading(what: str, kind: type[UnetrError] = ImageError) -> Iterator[None]:
    """Turn whatever pydicom and its decoders raise for a damaged file into an error of this project.

    Which exception a damaged file ends in is no part of their interfaces: ValueError, struct.error, zlib.error,
    pydicom's BytesLengthException and Pillow's DecompressionBombError were seen.

    Args:
        what: begins the sentence: which file or instance, and what could not be done.
        kind: of the error.
    """
    try:
        yield
    except UnetrError:
        raise
    except Exception as error:
        raise kind(f"{what}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """The message of a decoder's error, in one line and without the server's folders."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join("..." if word.startswith(("/", "'/")) else word for word in lines[-1].split())[:200]


def is_dicom(path: Path) -> bool:
    """Whether a regular file begins as PS3.10 says, or as a data set without preamble does."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return has_preamble(start) or _begins_as_data_set(start)


def has_preamble(start: bytes) -> bool:
    """Whether the first 132 bytes of a file are those of a DICOM file of PS3.10."""
    return start[128:132] == b"DICM"


def _begins_as_data_set(start: bytes) -> bool:
    """Whether a first element of group 0002 or 0008 stands there, in one of the three native encodings."""
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
    """The files in a folder (not below it) that are DICOM, whatever their names."""
    return [path for path in sorted(folder.iterdir()) if is_dicom(path)]


def read_instance(file: Path | BinaryIO, with_pixels: bool = True) -> FileDataset:
    """Read a file, with or without preamble; a transfer syntax that it does not name is the one it was read with.

    Raises:
        ImageError: when it is no DICOM instance.
        Exception: of whatever type pydicom raises for a damaged file; see :func:`reading`.
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
    """Refuse sequences that are nested too deeply; each value is decoded.

    Raises:
        ImageError: naming the limit.
        Exception: of whatever type pydicom raises for a damaged value; see :func:`reading`.
    """
    level: list[Dataset] = [instance]
    for _ in range(MOST_LEVELS + 1):
        elements = [element for dataset in level for element in dataset]
        level = [item for element in elements if element.VR == "SQ" for item in element.value]
        if not level:
            return
    raise ImageError(f"its sequences are nested more than {MOST_LEVELS} levels deep")


def _check_unpacked_size(file: Path | BinaryIO) -> None:
    """Refuse a deflated data set that pydicom, which unpacks it as a whole, would need too much memory for.

    Raises:
        ImageError: naming the limit.
    """
    with file.open("rb") if isinstance(file, Path) else nullcontext(file) as opened:
        start = opened.tell()
        try:
            if not has_preamble(opened.read(132)):  # without one no data set is deflated: its file meta says so
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
