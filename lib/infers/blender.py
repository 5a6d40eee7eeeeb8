"""Blends overlapping windows slab by slab, so that only the planes of the current slab are in memory for all
classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lib.infers.logit_margins import MOST_STEPS, STEP, LogitMargins

LabelArray = npt.NDArray[np.uint8]
HalfArray = npt.NDArray[np.float16]

# Planes are finished a few at a time, so that probabilities need little memory in addition to the sums.
CHUNK_NUMBERS = 4_000_000


class SlabBlender:
    """Accumulates weighted logits for the planes of the current windows, and computes the labels of finished planes.

    The class axis is the innermost one, as networks in the memory format ``channels_last_3d`` write it: adding a window
    and the argmax take a third of the time that they take with the class axis outermost.

    Args:
        shape: (X, Y, Z) of the volume.
        axis: axis along which the windows are sorted.
        weights: weights of a window's voxels, shape of the window, on the device of the sums.
        classes: number of output channels of the network.
        entropy: whether to compute the entropy of the blended probabilities too.
        of_labels: whether to compute it for labelled voxels only; it is 0 in the background.
        margins: whether to compute the second most likely label and its logit difference too.
    """

    def __init__(
        self,
        shape: Sequence[int],
        axis: int,
        weights: torch.Tensor,
        classes: int,
        entropy: bool = False,
        of_labels: bool = False,
        margins: bool = False,
    ) -> None:
        self._axis, self._depth, self._position, self._of_labels = axis, weights.shape[axis], 0, of_labels
        self._weights = weights.movedim(axis, 0)
        cross_section = [size for i, size in enumerate(shape) if i != axis]
        self._sums = torch.zeros((self._depth, *cross_section, classes), device=weights.device)
        self._labels = np.zeros((shape[axis], *cross_section), dtype=np.uint8)
        # The sum of weights has no effect on the argmax, but it has on probabilities.
        weighed = entropy or margins
        self._total = torch.zeros((self._depth, *cross_section), device=weights.device) if weighed else None
        self._entropy = np.zeros(self._labels.shape, dtype=np.float16) if entropy else None
        self._second, self._margin = (np.zeros_like(self._labels) if margins else None for _ in range(2))

    def advance(self, position: int) -> None:
        """Finish the planes before ``position``, and make room for the same number of new ones."""
        done = position - self._position
        if done == 0:
            return
        self._decide(done)
        for planes in (self._sums, self._total):
            if planes is not None:
                _shift(planes, done)
        self._position = position

    def add(self, start: Sequence[int], logits: torch.Tensor) -> None:
        """Add the logits of a window.

        Args:
            start: its first voxel; along the slab axis it equals the position of the last :meth:`advance`.
            logits: shape (classes, X, Y, Z) of the window, of any floating-point type.
        """
        window = logits.movedim(0, -1).movedim(self._axis, 0)
        origin = [s for i, s in enumerate(start) if i != self._axis]
        rows, columns = (slice(s, s + edge) for s, edge in zip(origin, window.shape[1:3], strict=True))
        self._sums[:, rows, columns].addcmul_(window, self._weights[..., None])
        if self._total is not None:
            self._total[:, rows, columns] += self._weights

    def finish(self) -> tuple[LabelArray, HalfArray | None]:
        """Finish the last planes; labels, and the entropy from 0 to 1 if requested, both of shape (X, Y, Z)."""
        self._decide(len(self._labels) - self._position)
        labels = np.moveaxis(self._labels, 0, self._axis)
        return labels, None if self._entropy is None else np.moveaxis(self._entropy, 0, self._axis)

    @property
    def margins(self) -> LogitMargins | None:
        """The logit margins if requested; complete after :meth:`finish`."""
        if self._second is None or self._margin is None:
            return None
        return LogitMargins(*(np.moveaxis(kept, 0, self._axis) for kept in (self._labels, self._second, self._margin)))

    def _decide(self, planes: int) -> None:
        planes = min(planes, self._depth)
        step = max(1, CHUNK_NUMBERS // self._sums[0].numel())
        for first in range(0, planes, step):
            chunk = slice(first, min(first + step, planes))
            place = slice(self._position + chunk.start, self._position + chunk.stop)
            labels = self._sums[chunk].argmax(dim=-1)
            self._labels[place] = labels.to(torch.uint8).cpu().numpy()
            if self._total is not None and self._entropy is not None:
                self._measure_entropy(labels, chunk, place, self._total, self._entropy)
            if self._total is not None and self._second is not None and self._margin is not None:
                second, margin = second_best(self._sums[chunk], self._total[chunk], labels)
                self._second[place], self._margin[place] = second.cpu().numpy(), margin.cpu().numpy()

    def _measure_entropy(
        self, labels: torch.Tensor, chunk: slice, place: slice, total: torch.Tensor, into: HalfArray
    ) -> None:
        if self._of_labels:
            wanted = labels > 0
            entropy = normalized_entropy(self._sums[chunk][wanted], total[chunk][wanted])
            into[place][wanted.cpu().numpy()] = entropy.cpu().numpy()
        else:
            into[place] = normalized_entropy(self._sums[chunk], total[chunk]).cpu().numpy()


def normalized_entropy(sums: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Entropy of the softmax of blended logits, divided by its largest possible value (Shannon 1948).

    Args:
        sums: weighted sums of logits, classes last.
        total: sums of the weights, without the class axis; 0 where no window was computed, which counts as certain.

    Returns:
        From 0 (certain) to 1 (all classes equally likely), shape of ``total``.
    """
    logits = sums / total.clamp_min(torch.finfo(total.dtype).tiny)[..., None]
    log_probabilities = torch.log_softmax(logits, dim=-1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(dim=-1) / math.log(sums.shape[-1])
    return entropy.clamp(0, 1) * (total > 0)


def second_best(sums: torch.Tensor, total: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The label of the second largest logit, and its difference from the largest.

    Args:
        sums: weighted sums of logits, class axis last; the largest value of each voxel is overwritten, which avoids a
            copy.
        total: sums of the weights, without the class axis; 0 where no window was computed, which counts as certain.
        labels: labels of the largest logits.

    Returns:
        Two uint8 arrays; the difference is in the steps of :class:`~lib.infers.logit_margins.LogitMargins`.
    """
    first = labels[..., None]
    largest = sums.gather(-1, first)[..., 0]
    sums.scatter_(-1, first, -torch.inf)
    next_largest, second = sums.max(dim=-1)
    margin = (largest - next_largest) / total.clamp_min(torch.finfo(total.dtype).tiny)
    seen = total > 0
    steps = torch.where(seen, (margin / STEP).round().clamp(0, MOST_STEPS), MOST_STEPS)
    return torch.where(seen, second, labels).to(torch.uint8), steps.to(torch.uint8)


def _shift(planes: torch.Tensor, done: int) -> None:
    """Move the remaining planes to the front, one by one so that no second slab is needed, and clear the others."""
    kept = max(0, len(planes) - done)
    for plane in range(kept):
        planes[plane] = planes[plane + done]
    planes[kept:] = 0
