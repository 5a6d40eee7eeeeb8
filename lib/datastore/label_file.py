"""Reading a mask's file, with the segments that the header of 3D Slicer's ``.seg.nrrd`` describes.

The header is looked at first: a mask of another shape than its image's is refused before its voxels take memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from lib.datastore.segment_header import Segment, flatten, parse_segments
from lib.errors import ImageError, LabelError
from lib.storage.compressed import DAMAGED, unpacked_size
from lib.transforms.volume import ITK_SUFFIXES, LPS_TO_RAS, NIFTI_SUFFIXES, Grid, Volume, read_grid, read_volume

KEPT_SUFFIX = ".nii.gz"
MOST_AFTER_VOXELS = 2**20
"""Bytes that a NIfTI file may have beside its voxels: its header, extensions, padding."""


@dataclass(frozen=True)
class LabelFile:
    """A mask as it was read.

    Attributes:
        volume: its voxels and where they lie.
        segments: what its header says of them; none where it says nothing.
        layered: the file has several layers, and each voxel has the position of its segment in ``segments``, from 1.
    """

    volume: Volume
    segments: tuple[Segment, ...] = ()
    layered: bool = False


def read_label(file: Path, image: Grid | None = None) -> LabelFile:
    """Read a mask.

    Args:
        file: NIfTI, NRRD or MetaImage.
        image: its image's grid; a mask that has another shape is refused before its voxels are read.

    Raises:
        LabelError: when it cannot be read, is not 3D, has another shape, or has overlapping segments.
    """
    segments = read_segments(file)
    try:
        shape = _shape(file)
        if shape is not None and image is not None:
            check_shape(shape, image)
        _check_packing(file)
        if len({segment.layer for segment in segments}) > 1:
            return LabelFile(_read_layers(file, segments), segments, layered=True)
        return LabelFile(read_volume(file), segments)
    except ImageError as error:
        raise LabelError(f"the label cannot be read: {str(error).removeprefix('image ')}") from error


def check_shape(shape: tuple[int, ...], image: Grid) -> None:
    """Refuse a mask that has not as many voxels as its image along the axes, in whatever order.

    Raises:
        LabelError: naming both shapes.
    """
    if sorted(shape) != sorted(image.shape):
        raise LabelError(f"the label has shape {shape}; valid: its image's {image.shape}")


def read_segments(file: Path) -> tuple[Segment, ...]:
    """The segments that a file's header describes, without reading its voxels; none where it cannot be read.

    Raises:
        LabelError: when the header contradicts itself.
    """
    header = _itk_header(file) if file.name.lower().endswith(".nrrd") else None
    if header is None:
        return ()
    return parse_segments({key: header.GetMetaData(key) for key in header.GetMetaDataKeys()})


def is_kept_as(file: Path, dtype: npt.DTypeLike) -> bool:
    """Whether a file is a compressed 3D NIfTI file of that type, without a scale."""
    if not file.name.endswith(KEPT_SUFFIX):
        return False
    stored = nib.load(file)
    unscaled = (stored.dataobj.slope, stored.dataobj.inter) == (1.0, 0.0)
    return len(stored.shape) == 3 and unscaled and stored.get_data_dtype() == np.dtype(dtype)


def _shape(file: Path) -> tuple[int, ...] | None:
    """The three axes of a mask, from its header alone; None where only whoever reads the voxels can tell.

    Raises:
        ImageError: when a NIfTI file cannot be read, or is not 3D.
    """
    name = file.name.lower()
    if name.endswith(NIFTI_SUFFIXES) and file.is_file():
        return read_grid(file).shape
    header = _itk_header(file) if name.endswith(ITK_SUFFIXES) else None
    if header is None or header.GetDimension() < 3:
        return None
    return tuple(header.GetSize()[:3])


def _itk_header(file: Path) -> sitk.ImageFileReader | None:
    """What ITK reads of a file's header; None where it cannot: whoever reads the voxels says what is wrong."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return reader


def _check_packing(file: Path) -> None:
    """Hold a compressed NIfTI file against its checksum; ITK does that itself for the other kinds.

    Raises:
        LabelError: when it is damaged, cut off, or holds more than its header says.
    """
    if not file.name.lower().endswith(".nii.gz"):
        return
    stored = nib.load(file)
    most = math.prod(stored.shape) * stored.get_data_dtype().itemsize + MOST_AFTER_VOXELS
    try:
        size = unpacked_size(file, most)
    except DAMAGED as error:
        raise LabelError(f"the label cannot be read: {file.name!r} is damaged or cut off ({error})") from error
    if size > most:
        raise LabelError(f"the label cannot be read: {file.name!r} holds more than its header says")


def _read_layers(file: Path, segments: tuple[Segment, ...]) -> Volume:
    """The mask of a file of several layers, which ITK reads as a 3D image of vectors."""
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise LabelError(f"the label cannot be read: {file.name!r} is damaged") from error
    voxels: npt.NDArray[np.generic] = sitk.GetArrayViewFromImage(image)
    if image.GetDimension() != 3 or voxels.ndim != 4:
        raise LabelError(f"the label has shape {voxels.T.shape}; valid: 3D, or 3D in layers")
    if voxels.dtype.kind not in "iub":
        raise LabelError(f"the label has layers of type {voxels.dtype}; valid: whole numbers")
    affine_ras = np.eye(4)
    affine_ras[:3, :3] = LPS_TO_RAS @ np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine_ras[:3, 3] = LPS_TO_RAS @ image.GetOrigin()
    mask = flatten(voxels.transpose(3, 2, 1, 0), segments)  # from (Z, Y, X, layers)
    return Volume(mask.astype(np.float32), affine_ras)
