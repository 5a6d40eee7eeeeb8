"""Places a tilted stack of slices on an upright grid: each slice is shifted by whole pixels, and no value changes.

Viewers stack slices along their normal. They show a stack whose slices are shifted sideways from one to the next (a
tilted gantry) as skewed. Here each slice is embedded in a larger one, shifted so that its voxels lie within half a
pixel of their positions. A mask of the upright series is cropped back to the slices voxel by voxel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.dicom.presented.grid import LPS, Affine

SAME_PLACE_VOXELS = 0.1
"""Largest sideways shift, relative to the shortest voxel edge, with which a stack counts as upright."""


@dataclass(frozen=True)
class UprightGrid:
    """The grid of an upright series.

    Attributes:
        shape: columns, rows, slices.
        source_shape: columns, rows, slices of the original stack.
        moves: whole columns and rows by which each slice is shifted, from 0; shape (slices, 2).
        affine_lps: 4x4, from (column, row, slice) to millimetres in LPS, with axes at right angles.
    """

    shape: tuple[int, int, int]
    source_shape: tuple[int, int, int]
    moves: npt.NDArray[np.intp]
    affine_lps: Affine

    @classmethod
    def of(cls, shape: tuple[int, int, int], affine_ras: Affine) -> UprightGrid:
        """The grid for a stack's array (columns, rows, slices in order along their normal) and affine.

        >>> affine_ras = np.array([[-1, 0, 0, 0], [0, -1, -1.6, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]])
        >>> grid = UprightGrid.of((10, 10, 3), affine_ras)
        >>> grid.shape, grid.moves[:, 1].tolist()
        ((10, 13, 3), [0, 2, 3])
        """
        affine = LPS @ affine_ras
        columns, rows, step = affine[:3, :3].T
        normal = np.cross(columns, rows) / np.linalg.norm(np.cross(columns, rows))
        upright = affine.copy()
        upright[:3, 2] = (step @ normal) * normal
        sideways = step - upright[:3, 2]
        pixels = np.array([sideways @ axis / (axis @ axis) for axis in (columns, rows)])
        shortest = float(np.linalg.norm(affine[:3, :3], axis=0).min())
        farthest = float(np.linalg.norm(sideways)) * (shape[2] - 1)
        moves = np.rint(np.arange(shape[2])[:, None] * pixels).astype(np.intp)
        if farthest <= SAME_PLACE_VOXELS * shortest:
            moves = np.zeros((shape[2], 2), dtype=np.intp)
            upright = affine
        least = moves.min(axis=0)
        upright[:3, 3] += least[0] * columns + least[1] * rows
        widest = moves.max(axis=0) - least
        return cls((shape[0] + int(widest[0]), shape[1] + int(widest[1]), shape[2]), shape, moves - least, upright)

    @property
    def is_tilted(self) -> bool:
        """Whether the stack is tilted."""
        return self.shape != self.source_shape or bool(self.moves.any())

    def to_series(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The stack's array on the upright grid; 0 outside of the slices."""
        if not self.is_tilted:
            return voxels
        moved = np.zeros(self.shape, dtype=voxels.dtype, order="F")
        for number, place in enumerate(self._places()):
            moved[place[0], place[1], number] = voxels[:, :, number]
        return moved

    def to_file(self, voxels: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """The inverse of :meth:`to_series`, which discards voxels outside of the slices."""
        if not self.is_tilted:
            return voxels
        return np.stack([voxels[at[0], at[1], number] for number, at in enumerate(self._places())], axis=2)

    def index_in_file(self, index: Sequence[float]) -> list[float]:
        """The index (column, row, slice) in the stack for an index on the upright grid."""
        column, row, number = index
        nearest = int(np.clip(np.rint(number), 0, self.shape[2] - 1))
        return [column - float(self.moves[nearest, 0]), row - float(self.moves[nearest, 1]), number]

    def lies_on_file(self, affine_ras: Affine) -> bool:
        """Whether each voxel lies where the stack's own affine places it, which is false for a tilted stack."""
        return not self.is_tilted

    @property
    def affine_ras(self) -> Affine:
        """Like ``affine_lps``, to RAS."""
        affine: Affine = LPS @ self.affine_lps
        return affine

    def _places(self) -> list[tuple[slice, slice]]:
        columns, rows, _ = self.source_shape
        return [(slice(c, c + columns), slice(r, r + rows)) for c, r in self.moves.tolist()]
