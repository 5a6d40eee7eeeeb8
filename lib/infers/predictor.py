"""Predicts labels of a preprocessed image by sliding windows over the body, which are blended slab by slab.

The usual method blends all windows in one tensor of (classes, X, Y, Z): 14 classes of a 512x512x600 CT take 8.8 GB.
Here the windows are visited in order along one axis. A plane that no later window covers is finished at once, so that
all classes exist only for as many planes as a window is thick. The labels equal those of the usual method. Where even a
slab is too large, the volume is divided across it into bands, each of which is computed from all windows that cover it.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from torch import nn

from lib.configs.preset import Preset
from lib.infers.blender import HalfArray, LabelArray, SlabBlender
from lib.infers.logit_margins import MOST_STEPS, LogitMargins
from lib.infers.transfer import PendingTransfer, batches_ahead, send
from lib.networks.placement import Placement

Start = tuple[int, ...]
Box = tuple[slice, slice, slice]

# Margin of air around the body, in voxels; the smaller margin is used if it saves a row of windows.
BODY_MARGIN_VOXELS = 8
LEAST_MARGIN_VOXELS = 2


@dataclass(frozen=True)
class Stitching:
    """How windows are computed and blended; it affects the cost, but not the result.

    Attributes:
        window_batch: number of windows in one forward pass.
        on_device: whether the sums are on the network's device; otherwise they are on the host.
        bands: number of parts of each slab, which are computed one after the other.
    """

    window_batch: int = 1
    on_device: bool = False
    bands: int = 1


@dataclass(frozen=True)
class Prediction:
    """The result of the windows.

    Attributes:
        labels: shape (X, Y, Z).
        entropy: of the blended probabilities, from 0 (certain) to 1; None if it was not requested.
        windows: number of windows computed.
        skipped: number of windows skipped because they contain only air.
        margins: logit margins; None if they were not requested.
    """

    labels: LabelArray
    entropy: HalfArray | None
    windows: int
    skipped: int
    margins: LogitMargins | None = None


def predict(
    network: nn.Module,
    image: torch.Tensor,
    where: Placement,
    stitching: Stitching | None = None,
    overlap: float | None = None,
    entropy: bool = False,
    ahead: int | None = None,
    of_labels: bool = False,
    margins: bool = False,
) -> Prediction:
    """Segment one preprocessed image.

    Windows are blended with Gaussian weights, so that a voxel is decided by the windows in which it lies centrally.
    They are placed over the body. The surroundings of the body, and windows that contain only air, become background,
    unless the preset requires air to be segmented.

    Args:
        network: a UNETR of the preset, in evaluation mode on ``device``.
        image: shape (1, X, Y, Z), at least as large as the preset's window along every axis; on any device.
        where: the preset, the device and the number format.
        stitching: how windows are blended; by default one by one on the host.
        overlap: smallest share of a window that the next one covers too; by default chosen from the preset's overlaps.
        entropy: whether to compute the entropy of each voxel too.
        ahead: batches that are computed before the first of them is fetched; by default chosen for the device.
        of_labels: whether to compute the entropy of labelled voxels only, which takes a small part of the time; it is 0
            in the background.
        margins: whether to compute the second most likely label of each voxel and its logit difference.
    """
    plain, preset = image.as_subclass(torch.Tensor), where.preset
    labels = np.zeros(plain.shape[1:], dtype=np.uint8)
    certain = np.zeros(labels.shape, dtype=np.float16) if entropy else None
    kept_margins = LogitMargins(labels.copy(), labels.copy(), np.full_like(labels, MOST_STEPS)) if margins else None
    # The lowest value over several channels does not identify air in each of them.
    air = float(plain.min()) if preset.inference.skip_air and not preset.channels else None
    overlaps = preset.inference.overlaps if overlap is None else (overlap,)
    body, overlap = _place_over_body(plain[0], air, preset, overlaps)
    inside = (slice(None), *body)
    ahead = batches_ahead(where.device) if ahead is None else ahead
    walk = _SlidingWindow(network, plain[inside], where, stitching or Stitching(), air, ahead)
    walk.place(overlap)
    with torch.inference_mode():
        for band, (of_band, uncertainty), of_margins in walk.bands(entropy, of_labels, margins):
            labels[body][band] = of_band
            if certain is not None and uncertainty is not None:
                certain[body][band] = uncertainty
            if kept_margins is not None and of_margins is not None:
                kept_margins.labels[body][band] = of_band
                kept_margins.second[body][band], kept_margins.margin[body][band] = of_margins.second, of_margins.margin
    return Prediction(labels, certain, walk.computed, walk.skipped, kept_margins)


def window_starts(size: int, edge: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis: the fewest windows with at least this overlap, evenly spaced.

    MONAI's sliding window places the same number, but shifts the last one back to the end of the image, so that it
    mostly repeats the window before it while the others have only the smallest overlap.

    >>> window_starts(size=100, edge=48, overlap=0.25)
    [0, 26, 52]
    """
    interval = max(1, int(edge * (1 - overlap)))
    steps = math.ceil((size - edge) / interval)
    return [round(step * (size - edge) / steps) for step in range(steps + 1)] if steps > 0 else [0]


def window_count(shape: Sequence[int], roi: Sequence[int], overlap: float) -> int:
    """Number of windows that cover a volume."""
    return math.prod(len(window_starts(size, edge, overlap)) for size, edge in zip(shape, roi, strict=True))


def choose_overlap(shape: Sequence[int], preset: Preset) -> float:
    """The largest of the preset's overlaps that respects its limit of windows; the smallest if none does."""
    return _largest_within(preset, preset.inference.overlaps, lambda _: shape)


def occupied_sides(image: torch.Tensor, air: float) -> tuple[torch.Tensor, ...]:
    """For each axis, the positions at which there is anything but air.

    Args:
        image: shape (X, Y, Z).
        air: the value of air, which is the lowest value after clipping to the preset's intensity window.
    """
    along_x = torch.tensor([bool((plane > air).any()) for plane in image])
    seen_yz = torch.zeros(image.shape[1:], dtype=torch.bool, device=image.device)
    for plane in image:
        seen_yz |= plane > air
    return along_x, seen_yz.any(1), seen_yz.any(0)


def body_box(sides: Sequence[torch.Tensor], roi: Sequence[int], overlap: float) -> Box:
    """The bounding box of all voxels other than air, with a margin, and at least as large as a window.

    Args:
        sides: result of :func:`occupied_sides` for an image that is at least as large as ``roi``.
        roi: shape of a window.
        overlap: share of a window that the next one covers too.
    """
    x, y, z = (_reach(side, edge, overlap) for side, edge in zip(sides, roi, strict=True))
    return x, y, z


def _place_over_body(
    image: torch.Tensor, air: float | None, preset: Preset, overlaps: Sequence[float]
) -> tuple[Box, float]:
    """The box that the windows cover, and the largest overlap that respects the preset's limit of windows."""
    sides = None if air is None else occupied_sides(image, air)

    def box_with(overlap: float) -> Box:
        return _whole(image.shape) if sides is None else body_box(sides, preset.roi_size, overlap)

    overlap = _largest_within(preset, overlaps, lambda one: [side.stop - side.start for side in box_with(one)])
    return box_with(overlap), overlap


def _largest_within(preset: Preset, overlaps: Sequence[float], shape_with: Callable[[float], Sequence[int]]) -> float:
    """The first overlap with which at most the preset's ``max_windows`` windows cover the shape; otherwise the last."""
    most, roi = preset.inference.max_windows, preset.roi_size
    fitting = (overlap for overlap in overlaps if window_count(shape_with(overlap), roi, overlap) <= most)
    return next(fitting, overlaps[-1])


def _reach(occupied: torch.Tensor, edge: int, overlap: float) -> slice:
    """The range of occupied positions, with the margin that needs the fewest windows."""
    margins = range(BODY_MARGIN_VOXELS, LEAST_MARGIN_VOXELS - 1, -1)
    reaches = [_reach_with(occupied, edge, margin) for margin in margins]
    return min(reaches, key=lambda reach: len(window_starts(reach.stop - reach.start, edge, overlap)))


def _reach_with(occupied: torch.Tensor, edge: int, margin: int) -> slice:
    """The range of occupied positions with a margin, shifted and widened to at least ``edge`` positions."""
    places = occupied.nonzero().flatten()
    if len(places) == 0:
        return slice(0, edge)
    first = max(0, int(places[0]) - margin)
    last = min(len(occupied), int(places[-1]) + 1 + margin)
    missing = max(0, edge - (last - first))
    first = min(max(0, first - missing // 2), len(occupied) - max(edge, last - first))
    return slice(first, max(last, first + edge))


class _SlidingWindow:
    """The sequence of windows over one image, band by band and slab by slab."""

    def __init__(
        self,
        network: nn.Module,
        image: torch.Tensor,
        where: Placement,
        stitching: Stitching,
        air: float | None,
        ahead: int,
    ) -> None:
        self._network, self._image, self._where, self._preset = network, image, where, where.preset
        self._device, self._stitching, self._air, self._ahead = where.device, stitching, air, ahead
        self._shape, self._roi = tuple(image.shape[1:]), where.preset.roi_size
        # A slab across the longest axis has the smallest cross-section; bands divide its longer side.
        self._axis, self._across = (int(axis) for axis in np.argsort(self._shape, kind="stable")[::-1][:2])
        kept_on = where.device if stitching.on_device else torch.device("cpu")
        self._weights = compute_importance_map(self._roi, mode="gaussian", device=kept_on)
        self._starts: list[list[int]] = []
        self.computed, self.skipped = 0, 0

    def place(self, overlap: float) -> None:
        """Choose the positions of the windows."""
        self._starts = [window_starts(size, edge, overlap) for size, edge in zip(self._shape, self._roi, strict=True)]

    def bands(
        self, entropy: bool, of_labels: bool, margins: bool
    ) -> Iterator[tuple[Box, tuple[LabelArray, HalfArray | None], LogitMargins | None]]:
        """The box, the result and the logit margins of each band."""
        edges = np.linspace(0, self._shape[self._across], self._stitching.bands + 1).astype(int).tolist()
        for first, last in itertools.pairwise(edges):
            yield self._band(first, last, entropy, of_labels, margins)

    def _band(
        self, first: int, last: int, entropy: bool, of_labels: bool, margins: bool
    ) -> tuple[Box, tuple[LabelArray, HalfArray | None], LogitMargins | None]:
        """Compute the planes ``first`` to ``last`` across the slabs, from all windows that cover them."""
        edge = self._roi[self._across]
        reaching = [start for start in self._starts[self._across] if start < last and start + edge > first]
        # The extent of the whole windows, of which only the band is kept, so that no window is cropped.
        low, high = reaching[0], reaching[-1] + edge
        shape = [high - low if axis == self._across else size for axis, size in enumerate(self._shape)]
        blender = SlabBlender(shape, self._axis, self._weights, self._preset.out_channels, entropy, of_labels, margins)
        for position in self._starts[self._axis]:
            blender.advance(position)
            sides = {self._axis: [position], self._across: reaching}
            todo = [
                s for s in itertools.product(*(sides.get(i, self._starts[i]) for i in range(3))) if self._has_tissue(s)
            ]
            for start, logits in self._compute(todo):
                blender.add([s - low if axis == self._across else s for axis, s in enumerate(start)], logits)
        labels, uncertainty = blender.finish()
        inside, place = list(_whole(shape)), list(_whole(self._shape))
        inside[self._across], place[self._across] = slice(first - low, last - low), slice(first, last)
        kept = tuple(inside)
        answer = labels[kept], None if uncertainty is None else uncertainty[kept]
        kept_margins = blender.margins
        if kept_margins is not None:
            kept_margins = LogitMargins(kept_margins.labels[kept], kept_margins.second[kept], kept_margins.margin[kept])
        return (place[0], place[1], place[2]), answer, kept_margins

    def _has_tissue(self, start: Start) -> bool:
        """Whether a window contains anything but air."""
        if self._air is None or bool((self._image[self._box(start)] > self._air).any()):
            return True
        self.skipped += 1
        return False

    def _compute(self, starts: Sequence[Start]) -> Iterator[tuple[Start, torch.Tensor]]:
        """The logits of each window, on the device of the sums."""
        size = self._stitching.window_batch
        coming: deque[tuple[Sequence[Start], PendingTransfer]] = deque()
        for batch in (starts[first : first + size] for first in range(0, len(starts), size)):
            windows = send(torch.stack([self._image[self._box(start)] for start in batch]), self._device)
            with self._where.autocast():
                logits = self._network(windows.contiguous(memory_format=torch.channels_last_3d))
            self.computed += len(batch)
            coming.append((batch, PendingTransfer(logits, self._weights.device)))
            if len(coming) > self._ahead:
                yield from _logits_of(*coming.popleft())
        while coming:
            yield from _logits_of(*coming.popleft())

    def _box(self, start: Start) -> tuple[slice, ...]:
        return (slice(None), *(slice(s, s + edge) for s, edge in zip(start, self._roi, strict=True)))


def _logits_of(starts: Sequence[Start], logits: PendingTransfer) -> Iterator[tuple[Start, torch.Tensor]]:
    return zip(starts, logits.wait(), strict=True)


def _whole(shape: Sequence[int]) -> Box:
    x, y, z = (slice(0, size) for size in shape)
    return x, y, z
