"""Reads NIfTI-1 and NIfTI-2 in a single file (https://nifti.nimh.nih.gov), from an open stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling

from lib.errors import ImageError
from lib.imagefiles.geometry import itk_affine_ras, nibabel_affine_ras
from lib.imagefiles.header import ImageHeader
from lib.imagefiles.kinds import Kind
from lib.imagefiles.payload import BLOCK_BYTES, BROKEN_STREAM, check_end, check_promise, open_stream, read_blocks

_SECOND_VERSION_BYTES = 540
# Header extensions precede the voxels; a compressed file has to be unpacked up to there.
_FARTHEST_VOXELS = 256 * 2**20


def read_nifti_header(file: BinaryIO, kind: Kind, name: str) -> ImageHeader:
    """Parse the header of an open file.

    Raises:
        ImageError: if it is damaged, or if its voxels are not single real numbers.
    """
    encoding = "gzip" if kind is Kind.NIFTI_GZ else "raw"
    file.seek(0)
    try:
        block = open_stream(file, encoding).read(_SECOND_VERSION_BYTES)
        header = _parse(block)
        sizes = tuple(int(size) for size in header.get_data_shape())
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset()) or header.single_vox_offset
        slope, intercept = header.get_slope_inter()
        affine, other = itk_affine_ras(_parse(block, mend=False)), nibabel_affine_ras(header)
    except (HeaderDataError, OSError, ValueError, TypeError, OverflowError, *BROKEN_STREAM) as error:
        raise ImageError(f"image {name!r} is damaged or not NIfTI: {_last_line(error)}") from error
    with np.errstate(over="ignore"):
        scaling = np.array([1.0 if slope is None else slope, intercept or 0.0]).astype(np.float32)
    if not np.isfinite(scaling).all():
        raise ImageError(f"image {name!r} is damaged: it scales its voxels by {slope} and adds {intercept}")
    if dtype.kind not in "iufb":
        raise ImageError(f"image {name!r} has voxels of type {dtype}; valid: one real number each")
    if not sizes or min(sizes) < 1 or not header.sizeof_hdr <= offset <= _FARTHEST_VOXELS:
        raise ImageError(f"image {name!r} is damaged: its header says {sizes} voxels from byte {offset} on")
    return ImageHeader(
        kind,
        sizes,
        dtype,
        affine,
        offset,
        encoding,
        slope=float(scaling[0]),
        intercept=float(scaling[1]),
        other_affine_ras=other,
    )


def read_nifti_voxels(file: BinaryIO, size: int, header: ImageHeader, name: str) -> npt.NDArray[np.float32]:
    """The scaled voxels of an open file of ``size`` bytes; shape as in the header.

    As they are stored, only a block of the voxels is in memory.

    Raises:
        ImageError: if they are damaged or cut off, or if their checksum is wrong.
    """
    voxels = np.empty(header.voxel_count, dtype=np.float32)
    done = 0
    for numbers in _scaled_blocks(file, size, header, BLOCK_BYTES // header.dtype.itemsize, name):
        voxels[done : done + len(numbers)] = numbers
        done += len(numbers)
    return voxels.reshape(header.sizes, order="F")


def read_nifti_planes(file: BinaryIO, size: int, header: ImageHeader, name: str) -> Iterator[npt.NDArray[np.float32]]:
    """Like :func:`read_nifti_voxels`, plane by plane of the first two axes, so that only one plane is in memory.

    Raises:
        ImageError: see :func:`read_nifti_voxels`; damage is detected with the last plane at the latest.
    """
    plane = header.sizes[:2]
    for numbers in _scaled_blocks(file, size, header, int(np.prod(plane)), name):
        yield numbers.reshape(plane, order="F")


def _scaled_blocks(
    file: BinaryIO, size: int, header: ImageHeader, at_once: int, name: str
) -> Iterator[npt.NDArray[np.float32]]:
    """The scaled voxels in the file's order, ``at_once`` of them at a time."""
    packed = size if header.encoding == "gzip" else size - header.offset
    check_promise(header.size_bytes, packed, header.encoding, name)
    file.seek(0)
    try:
        stream = open_stream(file, header.encoding)
        stream.seek(header.offset)
        for block in read_blocks(stream, header.size_bytes, at_once * header.dtype.itemsize, name):
            yield _scale(block.view(header.dtype), header.slope, header.intercept)
        if header.encoding != "raw":
            check_end(stream, name)
    except (OSError, *BROKEN_STREAM) as error:
        raise ImageError(f"image {name!r} is damaged or not NIfTI: {_last_line(error)}") from error


def _parse(block: bytes, mend: bool = True) -> Any:
    """A header; nibabel mends what it finds wrong, such as a negative ``pixdim``, unless it is to be left."""
    kinds = (nib.Nifti2Header, nib.Nifti1Header)
    kind = next(k for k in kinds if k.sizeof_hdr == _SECOND_VERSION_BYTES) if block[4:8] == b"n+2\0" else kinds[1]
    return kind(block[: kind.sizeof_hdr], check=mend)


def _scale(numbers: npt.NDArray[Any], slope: float, intercept: float) -> npt.NDArray[np.float32]:
    if (slope, intercept) != (1.0, 0.0):
        # computations use float32; numbers that it cannot represent are scaled in float64 first
        numbers = apply_read_scaling(numbers, np.float32(slope), np.float32(intercept))
    return np.asarray(numbers, dtype=np.float32)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
