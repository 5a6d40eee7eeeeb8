"""The header of an image file, which is read before any voxel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lib.imagefiles.kinds import Kind

Affine = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageHeader:
    """The validated header of a file.

    Attributes:
        kind: format of the file.
        sizes: lengths of the array's axes in the order of the file, the fastest first.
        dtype: type of a voxel.
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS, as ITK (3D Slicer, OHIF) reads it.
        offset: position of the first voxel in the decompressed file; for NRRD, in the file itself.
        encoding: ``raw``, ``gzip`` or ``bzip2`` for NIfTI and NRRD; ``text`` for an NRRD with numbers as text.
        slope: factor between stored number and voxel value.
        intercept: added after the factor.
        layer_axis: axis of layers, colours or vectors of an NRRD; None if a voxel has one value.
        fields: custom keys and values of an NRRD, such as ``Segment0_Name``.
        other_affine_ras: the affine as nibabel reads the header; None if only ITK accepts it, and for other formats
            than NIfTI.
    """

    kind: Kind
    sizes: tuple[int, ...]
    dtype: np.dtype[np.generic]
    affine_ras: Affine
    offset: int
    encoding: str
    slope: float = 1.0
    intercept: float = 0.0
    layer_axis: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    other_affine_ras: Affine | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes with the layer axis last, which is the shape of the returned voxels."""
        if self.layer_axis is None:
            return self.sizes
        spatial = [size for axis, size in enumerate(self.sizes) if axis != self.layer_axis]
        return (*spatial, self.sizes[self.layer_axis])

    @property
    def voxel_count(self) -> int:
        """Number of stored values."""
        return math.prod(self.sizes)

    @property
    def size_bytes(self) -> int:
        """Size of the decompressed voxels in bytes."""
        return self.voxel_count * self.dtype.itemsize
