"""Evenly spaced slices for a series with uneven spacing: their positions and values.

Slices at known but uneven distances on one straight line can be resampled along that line (linearly, between the two
slices around a position) without any change within their planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
WIDEST_GAP = 1.5
"""A gap that exceeds the median distance by this factor is a missing slice, whose content is unknown."""


@dataclass(frozen=True)
class EvenSlices:
    """Evenly spaced slices from the first to the last slice of a series.

    Attributes:
        places: positions of the series' own slices, in units of the even distance; the first is 0, the last ``count -
            1``.
        count: number of even slices.
        first_mm: position of the first voxel of the first even slice, in LPS.
        step_mm: vector from an even slice to the next, in LPS.
    """

    places: FloatArray
    count: int
    first_mm: FloatArray
    step_mm: FloatArray

    @property
    def farthest_mm(self) -> float:
        """Largest distance of an even slice from the nearest slice of the series."""
        apart = np.abs(np.arange(self.count)[:, None] - self.places[None, :]).min(axis=1)
        return float(apart.max() * np.linalg.norm(self.step_mm))

    def resample(self, voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Values of the even slices; shape (columns, rows, own slices) to (columns, rows, even slices)."""
        even = np.empty((*voxels.shape[:2], self.count), dtype=np.float32)
        below = np.clip(np.searchsorted(self.places, np.arange(self.count), side="right") - 1, 0, len(self.places) - 2)
        for index, low in enumerate(below):
            part = (index - self.places[low]) / (self.places[low + 1] - self.places[low])
            even[:, :, index] = (1 - part) * voxels[:, :, low] + part * voxels[:, :, low + 1]
        return even


def even_slices(positions_mm: FloatArray, normal: FloatArray) -> EvenSlices | None:
    """Even slices for slices that are sorted along the normal; None if one seems to be missing.

    Their distance is the median of the series' distances, adjusted to a whole number of slices.

    Args:
        positions_mm: positions of the first voxels, in LPS; shape (slices, 3).
        normal: normal of the slices, of length 1.
    """
    along = positions_mm @ normal
    steps = np.diff(along)
    middle = float(np.median(steps))
    if steps.min() <= 0 or steps.max() > WIDEST_GAP * middle:
        return None
    count = int(np.rint((along[-1] - along[0]) / middle)) + 1
    if count < 2:
        return None
    # the line through the first voxels, which is perpendicular to the slices or tilted
    centred = along - along.mean()
    direction = centred @ (positions_mm - positions_mm.mean(axis=0)) / (centred @ centred)
    between = (along[-1] - along[0]) / (count - 1)
    first = positions_mm.mean(axis=0) + direction * centred[0]
    return EvenSlices((along - along[0]) / between, count, first, direction * between)
