"""Maps the voxels of a file to a DICOM series and back: which axis is sliced, and the directions of rows and columns.

A series needs orthogonal columns, rows and slices in a right-handed order (PS3.3, C.7.6.2.1.1). The file's axes are
reordered and reversed, and no voxel is resampled. If the axes are not orthogonal, the series uses the nearest
orthogonal ones. Each voxel keeps its index, so that a mask of the series lies exactly on the file's own grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Affine = npt.NDArray[np.float64]
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MUCH_THICKER = 1.5
"""An axis whose voxels are longer than the others' by this factor is taken as the slice axis."""
SAME_PLACE_VOXELS = 0.05
"""Largest distance, relative to the shortest voxel edge, at which voxels count as coincident."""
SHOWN_TOWARDS = {0: ((1, 1), (2, -1)), 1: ((0, 1), (2, -1)), 2: ((0, 1), (1, 1))}
"""For each patient axis (L, P, S) that is sliced: axis and sign of columns and rows in radiological convention."""


@dataclass(frozen=True)
class SeriesGrid:
    """The grid of a series that presents a file.

    Attributes:
        order: file axes of columns, rows and slices.
        flips: whether each of these runs against the file's axis.
        shape: columns, rows, slices.
        affine_lps: 4x4, from (column, row, slice) to millimetres in LPS, with orthogonal axes.
    """

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    shape: tuple[int, int, int]
    affine_lps: Affine

    @classmethod
    def of(cls, shape: tuple[int, int, int], affine_ras: Affine) -> SeriesGrid:
        """The grid for a file's array and affine."""
        affine_lps = LPS @ affine_ras
        spacing = np.linalg.norm(affine_lps[:3, :3], axis=0)
        directions = affine_lps[:3, :3] / spacing
        patient_axis = _nearest_axes(directions)
        thickest = int(np.argmax(spacing))
        sliced = thickest if spacing[thickest] > MUCH_THICKER * np.sort(spacing)[1] else patient_axis.index(2)
        order, flips = [], []
        for wanted, sign in SHOWN_TOWARDS[patient_axis[sliced]]:
            axis = patient_axis.index(wanted)
            order.append(axis)
            flips.append(bool(directions[wanted, axis] * sign < 0))
        order.append(sliced)
        signs = [-1.0 if flip else 1.0 for flip in flips]
        handed = np.linalg.det(directions[:, order] * [*signs, 1.0])
        flips.append(bool(handed < 0))
        columns, rows, slices = order
        size = (shape[columns], shape[rows], shape[slices])
        return cls(
            (columns, rows, slices), (flips[0], flips[1], flips[2]), size, _upright(order, flips, shape, affine_lps)
        )

    def to_series(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The file's array (X, Y, Z) as (columns, rows, slices), without a copy."""
        turned = voxels.transpose(self.order)
        return turned[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]

    def to_file(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The inverse of :meth:`to_series`, without a copy."""
        turned = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]
        return turned.transpose(np.argsort(self.order))

    def index_in_file(self, index: Sequence[float]) -> list[float]:
        """The voxel index (X, Y, Z) in the file for (column, row, slice) in the series."""
        in_file = [0.0, 0.0, 0.0]
        for value, axis, flip, size in zip(index, self.order, self.flips, self.shape, strict=True):
            in_file[axis] = size - 1 - value if flip else value
        return in_file

    def lies_on_file(self, affine_ras: Affine) -> bool:
        """Whether each voxel lies where the file's own affine places it, which is false for a sheared file."""
        corners = [[n * (size - 1) for n, size in zip(at, self.shape, strict=True)] for at in np.ndindex(2, 2, 2)]
        in_file = np.array([self.index_in_file(corner) for corner in corners])
        there = in_file @ affine_ras[:3, :3].T + affine_ras[:3, 3]
        here = np.array(corners) @ self.affine_ras[:3, :3].T + self.affine_ras[:3, 3]
        shortest = float(np.linalg.norm(affine_ras[:3, :3], axis=0).min())
        return float(np.linalg.norm(there - here, axis=1).max()) <= SAME_PLACE_VOXELS * shortest

    @property
    def affine_ras(self) -> Affine:
        """Like ``affine_lps``, to RAS."""
        affine: Affine = LPS @ self.affine_lps
        return affine


def _nearest_axes(directions: Affine) -> list[int]:
    """The patient axis (0 to 2 for L, P, S) nearest to each file axis, each used once."""
    left, nearest = np.abs(directions).copy(), [0, 0, 0]
    for _ in range(3):
        patient, axis = np.unravel_index(int(np.argmax(left)), left.shape)
        nearest[int(axis)] = int(patient)
        left[patient, :] = left[:, axis] = -1.0
    return nearest


def _upright(order: list[int], flips: list[bool], shape: tuple[int, int, int], affine_lps: Affine) -> Affine:
    """The affine of the reordered array, with axes rotated to the nearest orthogonal ones around the image centre."""
    turned = np.eye(4)
    for place, (axis, flip) in enumerate(zip(order, flips, strict=True)):
        turned[:3, place] = affine_lps[:3, axis] * (-1.0 if flip else 1.0)
    first = np.array([shape[axis] - 1 if axis in order and flips[order.index(axis)] else 0 for axis in range(3)])
    middle = affine_lps[:3, :3] @ ((np.array(shape) - 1) / 2) + affine_lps[:3, 3]
    spacing = np.linalg.norm(turned[:3, :3], axis=0)
    u, _, vt = np.linalg.svd(turned[:3, :3] / spacing)
    rotation = u @ np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))]) @ vt
    sheared = np.abs(rotation * spacing - turned[:3, :3]).max() > 1e-6 * spacing.max()
    turned[:3, 3] = affine_lps[:3, :3] @ first + affine_lps[:3, 3]
    if sheared:
        turned[:3, :3] = rotation * spacing
        turned[:3, 3] = middle - turned[:3, :3] @ ((np.array([shape[axis] for axis in order]) - 1) / 2)
    return turned
