"""Reading a mask's file, with the segments that the header of 3D Slicer's ``.seg.nrrd`` describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from lib.datastore.segment_header import Segment, flatten, parse_segments
from lib.errors import ImageError, LabelError
from lib.transforms.volume import LPS_TO_RAS, Volume, read_volume


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


def read_label(file: Path) -> LabelFile:
    """Read a mask.

    Raises:
        LabelError: when it cannot be read, is not 3D, or has overlapping segments.
    """
    segments = read_segments(file)
    if len({segment.layer for segment in segments}) > 1:
        return LabelFile(_read_layers(file, segments), segments, layered=True)
    try:
        return LabelFile(read_volume(file), segments)
    except ImageError as error:
        raise LabelError(f"the label cannot be read: {str(error).removeprefix('image ')}") from error


def read_segments(file: Path) -> tuple[Segment, ...]:
    """The segments that a file's header describes, without reading its voxels; none where it cannot be read.

    Raises:
        LabelError: when the header contradicts itself.
    """
    if not file.name.lower().endswith(".nrrd"):
        return ()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return ()  # whoever reads the voxels says what is wrong
    return parse_segments({key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()})


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
