"""Reads the header, or the header and the voxels, of NIfTI and NRRD, and opens the file only once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import psutil

from lib.errors import FileKindError, ImageError, MemoryBudgetError
from lib.imagefiles.header import ImageHeader
from lib.imagefiles.kinds import HEAD_BYTES, Kind, find_kind, is_gzip, name_foreign
from lib.imagefiles.nifti import read_nifti_header, read_nifti_planes, read_nifti_voxels
from lib.imagefiles.nrrd_format import read_nrrd_header, read_nrrd_planes, read_nrrd_voxels
from lib.imagefiles.opening import open_regular

KNOWN_SUFFIXES = (".nii.gz", ".nii", ".nrrd")
BYTES_A_VOXEL = 4  # computations use float32


def read_kind(path: Path) -> Kind:
    """The format of a file, detected by its content.

    Raises:
        FileKindError: for an unsupported format.
        ImageError: if it cannot be opened, or has no known format.
    """
    with open_regular(path) as file:
        return _kind_of(file, path.name)


def read_header(path: Path) -> ImageHeader:
    """The header of a NIfTI or NRRD file, without reading voxels.

    Raises:
        FileKindError: for an unsupported format.
        ImageError: if it cannot be opened, is damaged, or refers to another file.
    """
    with open_regular(path) as file:
        return _header_of(file, path.name, _kind_of(file, path.name))


def find_header(path: Path) -> ImageHeader | None:
    """Like :func:`read_header`; None for DICOM, which has its own reader.

    Raises:
        FileKindError, ImageError: see :func:`read_header`.
    """
    with open_regular(path) as file:
        kind = _kind_of(file, path.name)
        return None if kind is Kind.DICOM else _header_of(file, path.name, kind)


def find_voxels(path: Path) -> tuple[ImageHeader, npt.NDArray[Any]] | None:
    """Like :func:`read_voxels`; None for DICOM, which has its own reader.

    Raises:
        MemoryBudgetError, FileKindError, ImageError: see :func:`read_voxels`.
    """
    with open_regular(path) as file:
        kind = _kind_of(file, path.name)
        return None if kind is Kind.DICOM else _voxels_of(file, path.name, kind)


def read_voxels(path: Path) -> tuple[ImageHeader, npt.NDArray[Any]]:
    """The header and the voxels, shape (X, Y, Z) or (X, Y, Z, layers); NIfTI is scaled and in float32.

    Raises:
        MemoryBudgetError: if by the header they need more memory than is free.
        FileKindError, ImageError: see :func:`read_header`; also if the voxels are damaged or cut off.
    """
    with open_regular(path) as file:
        return _voxels_of(file, path.name, _kind_of(file, path.name))


def read_planes(path: Path) -> Iterator[npt.NDArray[np.float32]]:
    """The voxels plane by plane of the first two axes in float32; only one plane is in memory.

    Raises:
        MemoryBudgetError, FileKindError, ImageError: see :func:`read_voxels`.
    """
    with open_regular(path) as file:
        header = _header_of(file, path.name, _kind_of(file, path.name))
        read = read_nrrd_planes if header.kind is Kind.NRRD else read_nifti_planes
        yield from read(file, os.fstat(file.fileno()).st_size, header, path.name)


def _voxels_of(file: BinaryIO, name: str, kind: Kind) -> tuple[ImageHeader, npt.NDArray[Any]]:
    header = _header_of(file, name, kind)
    check_memory(header.sizes, header.dtype.itemsize if kind is Kind.NRRD else 0, name)
    size = os.fstat(file.fileno()).st_size
    try:
        if header.kind is Kind.NRRD:
            return header, read_nrrd_voxels(file, size, header, name)
        return header, read_nifti_voxels(file, size, header, name)
    except MemoryError as error:
        raise MemoryBudgetError(f"image {name!r} has more voxels than memory holds") from error


def _header_of(file: BinaryIO, name: str, kind: Kind) -> ImageHeader:
    if kind is Kind.NRRD:
        return read_nrrd_header(file, name)
    if kind is Kind.DICOM:
        raise FileKindError(f"image {name!r} is DICOM; valid here: NIfTI, NRRD")
    return read_nifti_header(file, kind, name)


def _kind_of(file: BinaryIO, name: str) -> Kind:
    head = file.read(HEAD_BYTES)
    kind = find_kind(head)
    if kind is not None:
        return kind
    if (foreign := name_foreign(head)) is not None:
        raise FileKindError(f"image {name!r} is of another kind ({foreign}); valid: NIfTI, NRRD, DICOM")
    if is_gzip(head) or name.lower().endswith((".nii", ".nii.gz")):
        raise ImageError(f"image {name!r} is damaged or not NIfTI: it has no NIfTI header")
    if name.lower().endswith(".nrrd"):
        raise ImageError(f"image {name!r} is damaged or no image: it has no NRRD header")
    raise ImageError(f"image {name!r} is of an unknown kind; valid: {', '.join(KNOWN_SUFFIXES)}, DICOM")


def check_memory(sizes: Sequence[int], itemsize: int, name: str) -> None:
    """Check by the header, before anything is decompressed, that the voxels fit into memory.

    Args:
        sizes: voxels along each axis.
        itemsize: bytes of a stored voxel, if all stored voxels are in memory beside their float32 values; otherwise 0.
        name: name of the image.

    Raises:
        MemoryBudgetError: naming the required and the free memory.
    """
    needed = math.prod(sizes) * (itemsize + BYTES_A_VOXEL)
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryBudgetError(
            f"image {name!r} of {tuple(sizes)} voxels needs {needed / 2**30:.3g} GiB to be read, and "
            f"{free / 2**30:.3g} GiB are free"
        )
