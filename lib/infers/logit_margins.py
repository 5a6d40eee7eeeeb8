"""The logit margin of each voxel: the difference between the two largest logits, from which clicks correct a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lib.transforms.volume import FloatArray

LabelArray = npt.NDArray[np.uint8]

STEP = 0.1
"""Resolution of a stored margin, as a difference of logits."""
MOST_STEPS = 255
"""Largest stored margin, 25.5, which corresponds to a probability of one in 10^11."""
BEHIND = 3.0
"""Assumed logit difference between the second label and any further label, since only the second one is stored."""
BYTES_A_VOXEL = 3
TEMPERATURE = 2.0
"""Divides margins before they become shares, since networks are surer than they are right; see :meth:`shares`."""


@dataclass(frozen=True)
class LogitMargins:
    """The label, the second most likely label and the logit margin of each voxel, on the network's grid.

    Attributes:
        labels: the most likely labels, before any component is removed; shape (X, Y, Z).
        second: label of the second largest logit, shape (X, Y, Z); equal to ``labels`` where no window was computed.
        margin: the difference of both logits in steps of :data:`STEP`, shape (X, Y, Z).
    """

    labels: LabelArray
    second: LabelArray
    margin: LabelArray

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.labels.nbytes + self.second.nbytes + self.margin.nbytes)

    def shares(self, full: int) -> LabelArray:
        """What the most likely label has of ``full``, at least three more than half; the second label has the rest.

        The ratio of both is that of their probabilities at a temperature (Hinton et al. 2015).
        """
        probabilities = 1 / (1 + np.exp(-STEP * np.arange(MOST_STEPS + 1) / TEMPERATURE))
        by_steps = np.clip(np.rint(full * probabilities), full // 2 + 3, full).astype(np.uint8)
        shares: LabelArray = by_steps[self.margin]
        return shares

    def lead(self, value: int, part: tuple[slice | int, ...]) -> FloatArray:
        """The logit of one label minus the largest logit of the others, in a part of the grid.

        >>> margins = LogitMargins(*(np.array([[[v]]], np.uint8) for v in (1, 0, 20)))
        >>> [round(float(margins.lead(value, (0, 0, 0))), 1) for value in (1, 0, 2)]
        [2.0, -2.0, -5.0]
        """
        behind = self.margin[part] * np.float32(STEP)
        third = np.where(self.second[part] == value, -behind, -behind - np.float32(BEHIND))
        lead: FloatArray = np.where(self.labels[part] == value, behind, third).astype(np.float32)
        return lead
