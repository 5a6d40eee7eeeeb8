"""Even slices for a series whose own are not: where they lie, and their values.

Slices whose distances differ but whose places are known, all on one straight line, can be resampled along that line
(linearly, between the two slices around a place) without a change in their planes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
WIDEST_GAP = 1.5
"""A gap so many times as wide as the middle one is a missing slice: nothing is known of what is in it."""


@dataclass(frozen=True)
class EvenSlices:
    """Even slices from the first to the last of a series.

    Attributes:
        places: of the series' own slices, in numbers of even slices; the first is 0, the last ``count - 1``.
        count: of even slices.
        first_mm: the first voxel of the first even slice, in LPS.
        step_mm: from an even slice to the next, in LPS.
    """

    places: FloatArray
    count: int
    first_mm: FloatArray
    step_mm: FloatArray

    @property
    def farthest_mm(self) -> float:
        """How far an even slice lies from the nearest slice of the series, at most."""
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
    """Even slices for those at some positions, in order along the normal; None where one seems to be missing.

    They are as far apart as the middle one of the series' distances, and rounded to a whole number of slices.

    Args:
        positions_mm: of the first voxels, in LPS; shape (slices, 3).
        normal: of the slices, of length 1.
    """
    along = positions_mm @ normal
    steps = np.diff(along)
    middle = float(np.median(steps))
    if steps.min() <= 0 or steps.max() > WIDEST_GAP * middle:
        return None
    count = int(np.rint((along[-1] - along[0]) / middle)) + 1
    if count < 2:
        return None
    # the line on which the first voxels lie: straight up, or tilted
    centred = along - along.mean()
    direction = centred @ (positions_mm - positions_mm.mean(axis=0)) / (centred @ centred)
    between = (along[-1] - along[0]) / (count - 1)
    first = positions_mm.mean(axis=0) + direction * centred[0]
    return EvenSlices((along - along[0]) / between, count, first, direction * between)
