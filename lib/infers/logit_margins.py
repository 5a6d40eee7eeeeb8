"""How nearly a network chose another label, voxel by voxel: what clicks that correct its mask begin with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]

STEP = 0.1
"""Of a kept margin, as a difference of logits."""
MOST_STEPS = 255
"""A margin of 25.5 or more: a probability of one in 10^11."""
BEHIND = 3.0
"""How much further than the second a label lies behind the first, where it is neither; only the second is kept."""
BYTES_A_VOXEL = 3


@dataclass(frozen=True)
class LogitMargins:
    """What a network chose, what it would have chosen next, and by how much; on its own grid.

    Attributes:
        labels: the first, before any component is dropped; shape (X, Y, Z).
        second: the label of the second largest logit, shape (X, Y, Z); as ``labels`` where no window was.
        margin: the difference of both logits in steps of :data:`STEP`, shape (X, Y, Z).
    """

    labels: LabelArray
    second: LabelArray
    margin: LabelArray

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return int(self.labels.nbytes + self.second.nbytes + self.margin.nbytes)

    def lead(self, value: int, part: tuple[slice | int, ...]) -> FloatArray:
        """By how much the logit of one label exceeds the largest of the others in a part of the grid.

        >>> margins = LogitMargins(*(np.array([[[v]]], np.uint8) for v in (1, 0, 20)))
        >>> [round(float(margins.lead(value, (0, 0, 0))), 1) for value in (1, 0, 2)]
        [2.0, -2.0, -5.0]
        """
        behind = self.margin[part] * np.float32(STEP)
        third = np.where(self.second[part] == value, -behind, -behind - np.float32(BEHIND))
        lead: FloatArray = np.where(self.labels[part] == value, behind, third).astype(np.float32)
        return lead
