"""What a file says of its voxels before any of them is read."""

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
    """The header of a file, checked.

    Attributes:
        kind: of the file.
        sizes: of the array's axes as the file has them, the fastest first.
        dtype: of a voxel.
        affine_ras: 4x4 matrix from voxel indices to millimetres in RAS, as ITK (3D Slicer, OHIF) reads it.
        offset: where the voxels begin in the file once it is unpacked; for NRRD, in the file as it is.
        encoding: ``raw``, ``gzip`` or ``bzip2`` for NIfTI and NRRD; ``text`` for an NRRD of numbers in words.
        slope: a voxel's value is its number times this.
        intercept: plus this.
        layer_axis: the axis of an NRRD's layers, colours or vectors; None where a voxel has one value.
        fields: an NRRD's own keys and values, such as ``Segment0_Name``.
        other_affine_ras: where nibabel places the image; None where only ITK reads it, and for other kinds than NIfTI.
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
        """The sizes with layers last, as voxels are handed out."""
        if self.layer_axis is None:
            return self.sizes
        spatial = [size for axis, size in enumerate(self.sizes) if axis != self.layer_axis]
        return (*spatial, self.sizes[self.layer_axis])

    @property
    def voxel_count(self) -> int:
        """How many numbers there are."""
        return math.prod(self.sizes)

    @property
    def size_bytes(self) -> int:
        """Bytes of the voxels in the file, unpacked."""
        return self.voxel_count * self.dtype.itemsize
