"""Reads a mask file, with the segments that the header of 3D Slicer's ``.seg.nrrd`` describes.

The header is checked first: a mask with another shape than its image is refused before its voxels are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.datastore.label_files.segment_header import Segment, flatten, parse_segments
from lib.errors import FileKindError, ImageError, InputError, LabelError
from lib.imagefiles.header import ImageHeader
from lib.imagefiles.kinds import Kind
from lib.imagefiles.reading import find_header, read_header, read_voxels
from lib.transforms.volume import Grid, Volume, grid_of, read_grid, read_volume

KEPT_SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class LabelFile:
    """A mask as read from its file.

    Attributes:
        volume: its voxels and their affine.
        segments: segments in the header; empty if the header has none.
        layered: whether the file has several layers; each voxel then has the index of its segment in ``segments``,
            counted from 1.
        header: header of the file; None for DICOM.
    """

    volume: Volume
    segments: tuple[Segment, ...] = ()
    layered: bool = False
    header: ImageHeader | None = None


def read_label(file: Path, image: Grid | None = None) -> LabelFile:
    """Read a mask.

    Args:
        file: NIfTI or NRRD.
        image: grid of its image; a mask with another shape is refused before its voxels are loaded.

    Raises:
        FileKindError: for a format that is not supported.
        LabelError: if it cannot be read, is not 3D, has another shape, or has overlapping segments.
    """
    try:
        header = None if file.is_dir() else find_header(file)
        segments = parse_segments(header.fields) if header is not None else ()
        if header is not None and len({segment.layer for segment in segments}) > 1:
            if image is not None:
                check_shape(header.shape[:3], image)
            return LabelFile(_read_layers(file, segments), segments, layered=True, header=header)
        if image is not None:
            check_shape((grid_of(header, file.name) if header is not None else read_grid(file)).shape, image)
        return LabelFile(read_volume(file), segments, header=header)
    except ImageError as error:
        raise as_label_error(error) from error


def check_shape(shape: tuple[int, ...], image: Grid) -> None:
    """Refuse a mask whose axis lengths are not those of its image, in any order.

    Raises:
        LabelError: naming both shapes.
    """
    if sorted(shape) != sorted(image.shape):
        raise LabelError(f"the label has shape {shape}; valid: its image's {image.shape}")


def read_segments(file: Path) -> tuple[Segment, ...]:
    """The segments that a file header describes, without loading voxels; empty if it cannot be read.

    Raises:
        LabelError: if the header contradicts itself.
    """
    try:
        return parse_segments(read_header(file).fields)
    except ImageError:
        return ()  # the error is reported when the voxels are read


def is_kept_as(file: Path, header: ImageHeader | None, dtype: npt.DTypeLike) -> bool:
    """Whether a file with this header is a compressed 3D NIfTI file of this type, without scaling."""
    if header is None or not file.name.endswith(KEPT_SUFFIX):
        return False
    unscaled = (header.slope, header.intercept) == (1.0, 0.0)
    return header.kind is Kind.NIFTI_GZ and len(header.sizes) == 3 and unscaled and header.dtype == np.dtype(dtype)


def _read_layers(file: Path, segments: tuple[Segment, ...]) -> Volume:
    """The mask of a file with several layers."""
    try:
        header, voxels = read_voxels(file)
    except ImageError as error:
        raise as_label_error(error) from error
    if voxels.ndim != 4:
        raise LabelError(f"the label has shape {voxels.shape}; valid: 3D, or 3D in layers")
    if voxels.dtype.kind not in "iub":
        raise LabelError(f"the label has layers of type {voxels.dtype}; valid: whole numbers")
    mask = flatten(np.moveaxis(voxels, 3, 0), segments)
    return Volume(mask.astype(np.float32), header.affine_ras)


def as_label_error(error: ImageError) -> InputError:
    """The error as one about the label; its class is unchanged."""
    if isinstance(error, FileKindError):
        return FileKindError(f"the label cannot be read: {str(error).removeprefix('image ')}")
    return LabelError(f"the label cannot be read: {str(error).removeprefix('image ')}")
