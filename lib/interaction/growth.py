"""The change around a click, computed from the image alone: similar voxels up to the nearest border.

A click lies in the middle of an error, so its distance to the border of the mask is about the extent of the error. A
front propagates from the click through the image (fast marching, Sethian 1996), slowly where intensities differ from
those at the click; the voxels that it reaches within that distance are changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from scipy import ndimage

from lib.transforms.volume import FloatArray

MaskArray = npt.NDArray[np.bool_]
Place = npt.NDArray[np.int64]
"""Voxel indices, shape (3,)."""

FROM_NOTHING_VOXELS = 10.0
"""How far a click reaches where nothing is drawn nearby."""
LEAST_VOXELS, MOST_VOXELS = 1.05, 4.0
NEARBY_VOXELS = 14.0
"""How far the border is looked for; a mask that is further away is another matter."""
BEYOND_BORDER = 1.0
"""Times the distance to the border."""
NEVER = 2.0
"""The claim on voxels that a click does not reach; claims below 1 count."""


@dataclass(frozen=True)
class Claim:
    """How strongly a prompt claims the voxels around it.

    Attributes:
        start: the first voxel of ``values`` in the volume.
        values: 0 at the prompt, 1 at the border of the claim, more outside; shape (X, Y, Z).
    """

    start: Place
    values: FloatArray

    @property
    def part(self) -> tuple[slice, ...]:
        """The box of the claim in the volume."""
        return tuple(slice(int(a), int(a) + n) for a, n in zip(self.start, self.values.shape, strict=True))


def is_drawn_nearby(seed: Sequence[int], mask: MaskArray, spacing_mm: Sequence[float]) -> bool:
    """Whether the structure is drawn so near to a click that the click corrects its border."""
    return bool(mask[_nearby(seed, mask.shape, spacing_mm)].any())


def reach_of(
    seed: Sequence[int], mask: MaskArray, inside: bool, spacing_mm: Sequence[float], most: float = MOST_VOXELS
) -> float:
    """The distance that a click reaches, in voxels of the finest axis.

    Args:
        seed: the click.
        mask: the structure as it is drawn, shape (X, Y, Z).
        inside: whether the click lies in the structure and removes voxels; otherwise it adds voxels.
        spacing_mm: voxel size.
        most: largest distance.
    """
    part = _nearby(seed, mask.shape, spacing_mm)
    other = ~mask[part] if inside else mask[part]
    if not other.any():
        return most if inside else FROM_NOTHING_VOXELS
    places = np.argwhere(other) - (np.asarray(seed) - [side.start for side in part])
    distance = float(np.sqrt(((places * np.asarray(spacing_mm)) ** 2).sum(axis=1)).min()) / min(spacing_mm)
    return float(np.clip(BEYOND_BORDER * distance, LEAST_VOXELS, most))


def _nearby(seed: Sequence[int], shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    """The part of a volume in which a border near a click is searched."""
    margin = np.ceil(NEARBY_VOXELS * min(spacing_mm) / np.asarray(spacing_mm)).astype(int) + 1
    low = np.maximum(np.asarray(seed) - margin, 0)
    high = np.minimum(np.asarray(seed) + margin + 1, shape)
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def claim_around(image: FloatArray, seeds: Place, reach: float, spacing_mm: Sequence[float]) -> Claim:
    """The voxels that the front from ``seeds`` reaches.

    Args:
        image: shape (X, Y, Z).
        seeds: voxel indices, shape (n, 3).
        reach: in voxels of the finest axis.
        spacing_mm: voxel size.
    """
    finest = min(spacing_mm)
    margin = np.ceil(reach * finest / np.asarray(spacing_mm)).astype(int) + 2
    low = np.maximum(seeds.min(axis=0) - margin, 0)
    high = np.minimum(seeds.max(axis=0) + margin + 1, image.shape)
    crop = image[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    places = seeds - low
    speed = sitk.GetImageFromArray(_speed(crop, places))
    speed.SetSpacing([float(s) / finest for s in spacing_mm][::-1])
    front = sitk.FastMarchingImageFilter()
    front.SetStoppingValue(float(reach) * 1.5 + 1)
    front.SetTrialPoints([tuple(int(v) for v in place[::-1]) for place in places])
    arrival = sitk.GetArrayFromImage(front.Execute(speed))
    values = np.minimum(arrival / reach, NEVER).astype(np.float32)
    values[tuple(places.T)] = 0
    return Claim(low, values)


def _speed(crop: FloatArray, places: Place) -> FloatArray:
    """Speed of the front: 1 where intensities equal those at the seeds, and towards 0 the more they differ."""
    smooth = ndimage.gaussian_filter(crop, 0.7)
    at_seeds = smooth[tuple(places.T)]
    low, high = (float(end) for end in np.percentile(at_seeds, (10, 90)))
    near = np.zeros(crop.shape, dtype=bool)
    near[tuple(places.T)] = True
    # Noise at the seeds says what alike means; no more than the contrast in the crop, as where a border runs by.
    noise, contrast = float(smooth[ndimage.binary_dilation(near, iterations=2)].std()), float(smooth.std())
    scale = max(float(np.clip(2 * noise, 0.35 * contrast, contrast)), 1e-6)
    off = np.maximum(0, np.maximum(low - smooth, smooth - high) / scale - 1)
    speed: FloatArray = (1 / (1 + off**2)).astype(np.float32)
    return speed
